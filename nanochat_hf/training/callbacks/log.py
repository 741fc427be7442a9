"""The numbers of the steps: on the console, in the trackers and in metrics.jsonl."""

import math
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from nanochat_hf.machine.accelerator import sum_over_ranks
from nanochat_hf.machine.peaks import peak_flops
from nanochat_hf.training.tracking import Ema, MetricsFile, Progress, say

from .base import Callback

if TYPE_CHECKING:
    from nanochat_hf.training.trainer import StepInfo, Trainer

SETTLING_STEPS, ESTIMATE_AT = 3, 10  # the steps that compile, and the one after which the rest of the run is foretold


class Measures(Protocol):
    """More numbers of the steps, beside those that every run has."""

    def values(self, trainer: "Trainer") -> dict[str, float]:
        """Those since the last call, for the log. Called on every process."""
        ...

    def shown(self, values: Mapping[str, float]) -> dict[str, str]:
        """What the progress bar shows of them."""
        ...

    def figures(self) -> dict[str, Any]:
        """What report.md says of the run."""
        ...


def family(group: str) -> str:
    """What a parameter group is called in logs: the matrices of all shapes, which share one learning rate, are one.

    >>> family("matrix_64x256"), family("scalars")
    ('matrix', 'scalars')
    """
    return re.sub(r"_\d+x\d+$", "", group)


def joined_norms(norms: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """{family: norm} of the norms of groups: that of all the family's gradients together.

    >>> joined_norms({"matrix_2x2": torch.tensor(3.0), "matrix_2x4": torch.tensor(4.0)})
    {'matrix': 5.0}
    """
    joined: dict[str, float] = {}
    for name, norm in norms.items():
        joined[family(name)] = math.hypot(joined.get(family(name), 0.0), norm.item())
    return joined


class Log(Callback):
    """Every step the bar; every `every` steps the trackers and metrics.jsonl, with what `measures` adds.

    Ends the run when gradients stay non-finite.
    """

    name = "log"

    def __init__(  # noqa: PLR0913 - given by name where there is more than one
        self,
        trainer: "Trainer",
        description: str,
        flops_per_token: float,
        every: int = 10,
        output_dir: str | None = None,
        max_skipped: int = 20,
        measures: Measures | None = None,
    ):
        self.measures = measures
        self.every, self.flops, self.ema, self.max_skipped = every, flops_per_token, Ema(0.9), max_skipped
        self.peak = peak_flops(trainer.accelerator.device)
        self.main = trainer.accelerator.is_main_process
        self.metrics = MetricsFile(f"{output_dir}/metrics.jsonl" if output_dir and self.main else None)
        self.metrics.rewind(trainer.state.step)
        self.progress = Progress(trainer.accelerator, trainer.num_steps, trainer.state.step, description)
        self.clock, self.figures = time.perf_counter(), {}
        self.before = replace(trainer.state)  # as of the last entry
        self.first, self.settled, self.estimated = trainer.state.step, None, False

    def state_dict(self) -> dict[str, Any]:
        """The loss's moving average, and the figures that were shown last."""
        return {"loss": self.ema.value, "weight": self.ema.weight, "figures": self.figures}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict."""
        self.ema.value, self.ema.weight = float(state["loss"]), float(state["weight"])
        self.figures = {str(name): str(text) for name, text in state["figures"].items()}

    def __call__(self, trainer: "Trainer", info: "StepInfo") -> None:
        """Show the step; log where it is due."""
        done = info.step - self.first
        if done == SETTLING_STEPS:
            self.settled = time.perf_counter(), info.step
        if self.settled and not self.estimated and done >= ESTIMATE_AT:
            each = (time.perf_counter() - self.settled[0]) / (info.step - self.settled[1])
            left = each * (trainer.num_steps - info.step)
            say(trainer.accelerator, f"{each:.3g} s a step, about {left / 60:.1f} min to go")
            self.estimated = True
        if info.step % self.every and info.step != trainer.num_steps:
            self.progress.update(info.step, self.figures)
            return
        values = self._values(trainer, info)
        trainer.accelerator.log(values, step=info.step)
        self.metrics.write(step=info.step, **values)
        self.progress.update(info.step, self.figures, fresh=True)
        if info.step == trainer.num_steps:
            self.progress.close()
        self._check(trainer, info, values["train/loss"] if values["train/targets"] else 0.0)

    def _values(self, trainer, info):
        accelerator, state = trainer.accelerator, trainer.state
        start = time.perf_counter()
        loss = sum_over_ranks(accelerator)(info.loss.float()).item()
        now = time.perf_counter()
        state.seconds += now - start  # by which the device was behind the host
        targets = int(info.targets)
        if not targets:  # no loss either
            loss = self.ema.average
        elif math.isfinite(loss):  # what is not would stay in the average for good
            loss = self.ema.update(loss)
        rate = (state.tokens - self.before.tokens) / (now - self.clock)
        each = (state.seconds - self.before.seconds) / (state.step - self.before.step)
        self.clock, self.before = now, replace(state)
        values = {
            "train/loss": loss,
            "train/lr_multiplier": info.lr_multiplier,
            "train/tokens_per_second": rate,
            "train/step_seconds": each,
            "train/tokens": state.tokens,
            "train/targets": targets,
            "train/skipped_steps": state.skipped,
            "train/total_flops": self.flops * state.tokens,
            "train/seconds": state.seconds,
            "train/epoch": trainer.batches.epoch,
        }
        if accelerator.scaler is not None:
            values |= {"train/loss_scale": accelerator.scaler.get_scale(), "train/overflowed_steps": state.overflowed}
        values |= {f"grad_norm/{name}": norm for name, norm in joined_norms(info.grad_norms or {}).items()}
        values |= {f"lr/{family(group['name'])}": group["lr"] for group in trainer.optimizer.param_groups}
        self.figures = {"loss": f"{loss:.3f}", "lr": f"{info.lr_multiplier:.2f}", "tok/s": f"{rate:,.0f}"}
        if self.measures is not None:
            more = self.measures.values(trainer)
            values |= more
            self.figures = self.measures.shown(more) | self.figures
        if self.peak:
            values["train/mfu"] = self.flops * rate / (self.peak * accelerator.num_processes)
            self.figures["mfu"] = f"{values['train/mfu']:.1%}"
        if accelerator.device.type == "cuda":
            values["train/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            self.figures["mem"] = f"{values['train/peak_memory_gib']:.1f} GiB"
        return values

    def _check(self, trainer, info, loss):
        row, name = trainer.optimizer.optimizer.non_finite()
        if row_of := trainer.state.overflowing:
            row, name = row_of, f"float16, at a loss scale of {trainer.accelerator.scaler.get_scale():.3g}"
        if row and row >= self.max_skipped:
            raise ValueError(
                f"step {info.step}: gradients were not finite in {row} steps in a row, "
                f"in {name or 'another rank'} at the last; "
                "lower --matrix-lr and --embedding-lr, or use --dtype bfloat16 or float32; the last checkpoint is whole"
            )
        if row or not math.isfinite(loss):
            say(
                trainer.accelerator,
                f"warning: step {info.step}: loss {loss:.4g}, {row} steps in a row skipped "
                f"for non-finite gradients ({name or 'elsewhere'})",
            )
