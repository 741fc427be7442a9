"""The fast path against the plain one: do kernels, compilation and attention change what a model learns?

python -m scripts.experiments.fast_vs_plain --data 'text/*.parquet' --validation val.parquet --output runs/paths
[--num-steps 300] [--float8 true]

Each way is a run of base_train, side by side on as many GPUs as there are. "plain": the formulas as they stand,
uncompiled, with SDPA under masks. --float8 true adds a run with float8 products.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nanochat_hf.config import parse, user_errors
from scripts.experiments.muon_vs_adamw import ExperimentConfig, run_all, summary, table, train_tokenizer

LAST = 20  # steps whose mean loss is the loss at the end


@dataclass(frozen=True)
class PathsConfig(ExperimentConfig):
    """What to compare, and for how long."""

    depth: int = field(default=12, metadata={"help": "layers"})
    num_steps: int = field(default=300, metadata={"help": "optimizer steps"})
    total_batch_size: int = field(default=65536, metadata={"help": "tokens of an optimizer step"})
    float8: bool = field(default=False, metadata={"help": "also a run with --dtype float8"})
    attn: str = field(default="auto", metadata={"help": "attention of the fast path"})


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the trainings, and write what they show."""
    config, _ = parse([PathsConfig], argv, description=__doc__)
    started, output = time.monotonic(), Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    shared = {"num_steps": config.num_steps, "log_every": 1, "eval_every": config.num_steps}
    arms = {
        "fast": shared | {"attn": config.attn},
        "plain": shared | {"attn": "sdpa", "kernels": "false", "compile": "false"},
    } | ({"float8": shared | {"attn": config.attn, "dtype": "float8"}} if config.float8 else {})
    run_all(config, arms, config.tokenizer or train_tokenizer(config, output), started)
    runs = {name: summary(output / name, name, flags) for name, flags in arms.items()}
    (output / "paths.json").write_text(json.dumps(runs, indent=1) + "\n")
    table(runs.values())
    compare(runs)
    draw(runs, config.plot or output / "fast_vs_plain.png")


def compare(runs):
    """Print how far each way's losses are from those of the fast one."""
    losses = {name: [loss for _, loss in run["loss"]] for name, run in runs.items()}
    at_end = {name: statistics.fmean(values[-LAST:]) for name, values in losses.items()}
    for name, values in losses.items():
        gaps = [abs(a - b) / a for a, b in zip(losses["fast"], values, strict=False)]
        print(
            f"{name:<7} first loss {values[0]:.4f}, mean of the last {LAST} {at_end[name]:.4f} "
            f"({at_end[name] / at_end['fast'] - 1:+.3%} of fast's); one step differs by "
            f"{statistics.median(gaps):.3%} (median), {max(gaps):.3%} (most); bpb {runs[name]['bpb'][-1][1]:.4f}",
            flush=True,
        )


def draw(runs, path):
    """Both curves of the training loss, over one another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, run), style in zip(runs.items(), ("-", "--", ":"), strict=False):
        axes.plot(*zip(*run["loss"], strict=True), style, label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    print(f"plot in {path}", flush=True)


if __name__ == "__main__":
    main()
