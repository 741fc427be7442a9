"""Numbers of a run: smoothed loss, throughput, the console's progress, metrics.jsonl and what is logged once."""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from nanochat_hf.config import at_least
from nanochat_hf.machine.durable import write_whole

TRACKERS = ("wandb", "trackio", "tensorboard")


@dataclass(frozen=True)
class TrackConfig:
    """Where the numbers of a run go, and how often."""

    _argument_group_name = "tracking"

    report_to: str = field(
        default="none", metadata={"help": "wandb, trackio, tensorboard, several with commas, or none"}
    )
    run_name: str = field(default="nanochat_hf", metadata={"help": "project name for the tracker"})
    log_every: int = field(default=10, metadata={"help": "steps between log entries"})

    def __post_init__(self) -> None:
        at_least(self, 1, "log_every")
        for name in self.trackers:
            if name not in TRACKERS:
                raise ValueError(
                    f"--report-to {name} is unknown; choose wandb, trackio, tensorboard, several with commas, or none"
                )

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers' names: "wandb,tensorboard" → ("wandb", "tensorboard"), "none" → ()."""
        names = [name.strip() for name in self.report_to.split(",")]
        return () if names == ["none"] else tuple(dict.fromkeys(names))


class Ema:
    """Exponential moving average, debiased: Ema(0.9).update(3.0) → 3.0."""

    def __init__(self, beta: float = 0.9):
        self.beta, self.value, self.weight = beta, 0.0, 0.0

    def update(self, x: float) -> float:
        """Take x in; returns the debiased average."""
        self.value = self.beta * self.value + (1 - self.beta) * x
        self.weight = self.beta * self.weight + (1 - self.beta)
        return self.average

    @property
    def average(self) -> float:
        """The debiased average, NaN before the first update."""
        return self.value / self.weight if self.weight else float("nan")


class MetricsFile:
    """Appends one JSON object a line to `path`; None writes nothing."""

    def __init__(self, path: str | Path | None):
        self.path = Path(path) if path else None
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **values: Any) -> None:
        """Append `values`."""
        if self.path:
            try:
                with self.path.open("a") as handle:
                    handle.write(json.dumps(values) + "\n")
            except OSError as error:
                raise OSError(
                    f"{self.path} could not be written ({error.strerror}); checkpoints are whole: free space, "
                    "then --resume auto"
                ) from None

    def rewind(self, step: int) -> None:
        """Forget what a run that goes on from `step` will write again.

        All entries after it, and at it what is measured after saving.

        At 0, where a run starts, nothing stays.
        """
        if not self.path or not self.path.is_file():
            return
        kept = [entry for entry in read_metrics(self.path) if _stays(entry, step)]
        write_whole(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))


def _stays(entry, step):
    at = entry.get("step", 0)
    return at < step or (at == step and "train/loss" in entry)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """metrics.jsonl → list of dicts; a last line that a kill cut short is left out."""
    entries = []
    for line in Path(path).read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def say(accelerator: Accelerator, *lines: str) -> None:
    """Print lines on the main process, above the bar where there is one."""
    if accelerator.is_main_process:
        tqdm.write("\n".join(lines))
        sys.stdout.flush()


class Progress:
    """On a terminal one bar with %, step, figures and ETA; elsewhere a plain line whenever there are new figures.

    Main process only.
    """

    def __init__(self, accelerator: Accelerator, total: int, initial: int, description: str):
        self.total, self.description, self.shown = total, description, accelerator.is_main_process
        self.terminal = sys.stderr.isatty()
        self.start, self.initial = time.perf_counter(), initial
        self.bar = tqdm(
            total=total,
            initial=initial,
            desc=description,
            unit="step",
            disable=not (self.shown and self.terminal),
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def update(self, step: int, figures: Mapping[str, str], fresh: bool = False) -> None:
        """Move to `step` and show the given figures; `fresh` says that they are new."""
        if self.terminal:
            self.bar.set_postfix(figures, refresh=False)
            self.bar.update(step - self.bar.n)
        elif fresh and self.shown:
            left = (time.perf_counter() - self.start) / max(1, step - self.initial) * (self.total - step)
            text = "  ".join(f"{key} {value}" for key, value in figures.items())
            print(
                f"{self.description} step {step}/{self.total} ({step / self.total:.0%})  {text}  eta {left:.0f} s",
                flush=True,
            )

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """What else a number depends on: versions, git revision, hardware."""
    try:
        revision = (
            subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5).stdout.strip()
            or None
        )
    except (OSError, subprocess.TimeoutExpired):
        revision = None
    cuda = accelerator.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "git_revision": revision,
        "device": str(accelerator.device.type),
        "device_name": torch.cuda.get_device_name(accelerator.device)
        if cuda
        else platform.processor() or platform.machine(),
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        **{f"{name}_version": version(name) for name in ("torch", "transformers", "accelerate")},
    }
