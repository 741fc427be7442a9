"""Muon against plain AdamW on the matrices: data, tokens, depth, seed, schedule and all other groups are equal.

Two calls; each runs its arms side by side on as many GPUs as there are. The second takes the best rate of the first.

    python -m scripts.experiments.muon_vs_adamw --phase lr-search --data 'text/*.parquet' --validation val.parquet …
    python -m scripts.experiments.muon_vs_adamw --phase full --data … [--adamw-lr 0.002]
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanochat_hf import scaling
from nanochat_hf.config import parse, user_errors
from nanochat_hf.machine.peaks import peak_flops
from nanochat_hf.training.tracking import read_metrics


@dataclass(frozen=True)
class ExperimentConfig:
    """What to compare, and for how long."""

    data: str = field(metadata={"help": "training text, as base_train's --data"})
    validation: str = field(metadata={"help": "validation text"})
    output: str = field(metadata={"help": "folder for the runs, results.json and the plot"})
    phase: str = field(
        default="full",
        metadata={"help": "lr-search: short AdamW runs, one for each lr; full: Muon and the best AdamW; plot"},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "folder of the tokenizer (default: trained on the data first)"}
    )
    vocab_size: int = field(default=32768, metadata={"help": "tokens of the tokenizer trained here"})
    depth: int = field(default=16, metadata={"help": "layers"})
    minutes: float = field(
        default=5.1, metadata={"help": "length of a full run at the expected MFU, where --num-steps is not given"}
    )
    mfu: float = field(default=0.45, metadata={"help": "expected MFU, by which --minutes becomes a number of steps"})
    num_steps: int | None = field(default=None, metadata={"help": "optimizer steps of a full run"})
    search_fraction: float = field(
        default=0.25, metadata={"help": "length of the lr search's runs, as a share of a full one"}
    )
    lrs: list[float] = field(
        default_factory=lambda: [0.001, 0.002, 0.004, 0.008], metadata={"help": "AdamW's --matrix-lr to try"}
    )
    adamw_lr: float | None = field(
        default=None, metadata={"help": "AdamW's --matrix-lr of the full run (default: the best one found)"}
    )
    adamw_decay: float = field(default=0.1, metadata={"help": "AdamW's weight decay"})
    max_seq_len: int = field(default=2048, metadata={"help": "positions of a row"})
    device_batch_size: int = field(default=16, metadata={"help": "rows a GPU takes at once"})
    total_batch_size: int = field(default=131072, metadata={"help": "tokens of an optimizer step"})
    warmup: float = field(
        default=0.02, metadata={"help": "share of the run that warms up, in both arms, since AdamW suffers without"}
    )
    num_workers: int = field(default=4, metadata={"help": "data workers of each run"})
    seed: int = field(default=0, metadata={"help": "seed of every run"})
    limit_minutes: float = field(default=9.3, metadata={"help": "after so long runs are asked to save and stop"})
    plot: str | None = field(default=None, metadata={"help": "where to draw (default: OUTPUT/muon_vs_adamw.png)"})

    def __post_init__(self):
        if self.phase not in ("lr-search", "full", "plot"):
            raise ValueError(f"--phase {self.phase} is unknown; choose lr-search, full or plot")


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the trainings, and write what they show."""
    config, _ = parse([ExperimentConfig], argv, description=__doc__)
    started, output = time.monotonic(), Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    results = output / "results.json"
    found = json.loads(results.read_text()) if results.is_file() else {}
    if config.phase != "plot":
        steps = config.num_steps or steps_in(config)
        arms = search_arms(config, steps) if config.phase == "lr-search" else full_arms(config, steps, found)
        tokenizer = config.tokenizer or train_tokenizer(config, output)
        run_all(config, arms, tokenizer, started)
        found[config.phase] = [summary(output / name, name, flags) for name, flags in arms.items()]
        results.write_text(json.dumps(found, indent=1) + "\n")
    table(found.get(config.phase, found.get("full", [])))
    if found.get("lr-search"):
        print(f"best AdamW: --adamw-lr {best_lr(found)}")
    draw(found, config.plot or output / "muon_vs_adamw.png", config)


def steps_in(config):
    """Optimizer steps that take --minutes at the expected MFU on this machine's GPU."""
    peak = peak_flops(torch.device("cuda")) if torch.cuda.is_available() else None
    if peak is None:
        raise ValueError("the peak FLOP/s of this machine is unknown, so --minutes says nothing; give --num-steps")
    model = scaling.skeleton(scaling.model_config(config.depth, config.vocab_size, config.max_seq_len))
    flops = scaling.flops_per_token(model, config.max_seq_len)
    return scaling.training_horizon(
        0, flops, config.total_batch_size, target_flops=config.minutes * 60 * config.mfu * peak
    )


def search_arms(config, steps):
    """{name: what differs} of the short AdamW runs."""
    short = max(1, round(steps * config.search_fraction))
    return {f"adamw-{lr:g}": adamw(config, lr) | {"num_steps": short} for lr in config.lrs}


def full_arms(config, steps, found):
    """{name: what differs} of the two arms."""
    lr = config.adamw_lr or (best_lr(found) if found.get("lr-search") else None)
    if lr is None:
        raise ValueError("no learning rate for AdamW; give --adamw-lr, or run --phase lr-search first")
    return {"muon": {"num_steps": steps}, f"adamw-full-{lr:g}": adamw(config, lr) | {"num_steps": steps}}


def adamw(config, lr):
    """The flags that put plain AdamW in Muon's place."""
    return {"matrix_optimizer": "adamw", "matrix_lr": lr, "weight_decay": config.adamw_decay}


def best_lr(found):
    """The --matrix-lr of the search run with the lowest last bpb."""
    return min(found["lr-search"], key=lambda run: run["bpb"][-1][1])["matrix_lr"]


def train_tokenizer(config, output):
    """Train the tokenizer on the training text, unless an earlier phase did."""
    folder = output / "tokenizer"
    if not folder.is_dir():
        subprocess.run(
            [
                sys.executable,
                "-m",
                "scripts.tok_train",
                "--data",
                config.data,
                "--vocab-size",
                str(config.vocab_size),
                "--output",
                str(folder),
            ],
            check=True,
        )
    return str(folder)


def command(config, name, differing, tokenizer):
    """The base_train command of one arm."""
    steps = differing["num_steps"]
    flags = {
        "data": config.data,
        "validation": config.validation,
        "tokenizer": tokenizer,
        "output_dir": Path(config.output) / name,
        "depth": config.depth,
        "max_seq_len": config.max_seq_len,
        "device_batch_size": config.device_batch_size,
        "total_batch_size": config.total_batch_size,
        "packing": "keep",
        "num_workers": config.num_workers,
        "seed": config.seed,
        "dtype": "bfloat16",
        "warmup_steps": round(config.warmup * steps),
        "eval_every": max(1, steps // 12),
        "sample_every": 0,
    } | differing
    return [
        sys.executable,
        "-m",
        "scripts.base_train",
        *(str(p) for key, value in flags.items() for p in (f"--{key.replace('_', '-')}", value)),
    ]


def run_all(config, arms, tokenizer, started):
    """Run every arm, one on each GPU at a time; those that pass the limit are stopped. If one fails, all end."""
    cuda, waiting, running, told = torch.cuda.is_available(), list(arms), {}, time.monotonic()
    free = list(range(max(1, torch.cuda.device_count())))
    try:
        while waiting or running:
            while waiting and free:
                name, gpu = waiting.pop(0), free.pop(0)
                running[name] = launch(config, name, arms[name], tokenizer, gpu if cuda else None), gpu
                print(
                    f"{time.monotonic() - started:.0f} s: {name} starts on {'GPU' if cuda else 'CPU'} {gpu}", flush=True
                )
            time.sleep(0.5)
            over = time.monotonic() - started > config.limit_minutes * 60
            for name, (process, gpu) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    finish(config, name, process.returncode)
                    free.append(gpu)
                    print(f"{time.monotonic() - started:.0f} s: {name} done: {last_line(config, name)}", flush=True)
                elif over:
                    process.send_signal(signal.SIGTERM)
            while over and waiting:
                print(f"no time is left for {waiting[-1]}", flush=True)
                arms.pop(waiting.pop())
            if time.monotonic() - told > 20:
                told = time.monotonic()
                print(*(f"  {name}: {last_line(config, name)}" for name in running), sep="\n", flush=True)
    finally:
        for process, _ in running.values():
            process.terminate()


def launch(config, name, differing, tokenizer, gpu):
    """Start one arm, on the GPU of that number; its output goes into OUTPUT/name.log."""
    shutil.rmtree(Path(config.output) / name, ignore_errors=True)
    environment = (
        os.environ | {"TOKENIZERS_PARALLELISM": "false"} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    )
    with (Path(config.output) / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            command(config, name, differing, tokenizer), stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def finish(config, name, code):
    """What is left of an arm: its metrics and, of a full run, the model; the short runs' weights go."""
    if code not in (0, 143):
        raise ValueError(
            f"{name} failed with exit code {code}: {last_line(config, name)}; see {config.output}/{name}.log"
        )
    if config.phase == "lr-search":
        for folder in (Path(config.output) / name).glob("*/"):
            shutil.rmtree(folder)


def last_line(config, name):
    """The newest line that an arm printed."""
    lines = (Path(config.output) / f"{name}.log").read_text().strip().splitlines()
    return lines[-1] if lines else "nothing yet"


def summary(folder, name, flags):
    """Figures of one arm from its metrics.jsonl: pairs of step and bpb, and medians over all log entries but two."""
    entries = read_metrics(folder / "metrics.jsonl")
    settled = [e for e in entries if "train/loss" in e][2:] or [e for e in entries if "train/loss" in e]
    median = {
        key: statistics.median(e[f"train/{key}"] for e in settled)
        for key in ("tokens_per_second", "mfu")
        if f"train/{key}" in settled[0]
    }
    return {
        "name": name,
        "matrix_lr": flags.get("matrix_lr"),
        "num_steps": flags["num_steps"],
        "tokens": settled[-1]["train/tokens"],
        "epochs": settled[-1]["train/epoch"],
        "seconds": settled[-1]["train/seconds"],
        "bpb": [[e["step"], e["val/bpb"]] for e in entries if "val/bpb" in e],
        "loss": [[e["step"], e["train/loss"]] for e in entries if "train/loss" in e],
        "peak_memory_gib": max((e.get("train/peak_memory_gib", 0.0) for e in settled), default=0.0),
        **median,
    }


def table(runs):
    """Print one line a run."""
    for run in runs:
        best, mfu = min(value for _, value in run["bpb"]), f"MFU {run['mfu']:.1%}" if "mfu" in run else "MFU unknown"
        print(
            f"{run['name']:<18} {run['bpb'][-1][1]:.4f} bpb at the end, {best:.4f} at best; "
            f"{run['tokens'] / 1e6:.1f} M tokens ({run['epochs']:.1f} epochs) in {run['seconds']:.0f} s; "
            f"{run['tokens_per_second']:,.0f} tok/s, {mfu}, peak {run['peak_memory_gib']:.1f} GiB",
            flush=True,
        )


def draw(found, path, config):
    """The bpb curves of the full arms and, where there was a search, the last bpb of each learning rate."""
    from matplotlib.figure import Figure

    panels = [phase for phase in ("full", "lr-search") if found.get(phase)]
    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for axes, phase in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        if phase == "full":
            for run in found[phase]:
                label = "Muon" if run["matrix_lr"] is None else f"AdamW, lr {run['matrix_lr']:g}"
                axes.plot(
                    [s * config.total_batch_size / 1e6 for s, _ in run["bpb"][1:]],
                    [b for _, b in run["bpb"][1:]],
                    marker=".",
                    label=label,
                )
            axes.set(title=f"d{config.depth}, validation", xlabel="million tokens", ylabel="bits per byte")
            axes.legend()
        else:
            runs = sorted(found[phase], key=lambda run: run["matrix_lr"])
            axes.plot([r["matrix_lr"] for r in runs], [r["bpb"][-1][1] for r in runs], marker="o")
            axes.set(
                title=f"AdamW, {runs[0]['num_steps']} steps",
                xlabel="--matrix-lr",
                ylabel="last bits per byte",
                xscale="log",
            )
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    print(f"plot in {path}", flush=True)


if __name__ == "__main__":
    main()
