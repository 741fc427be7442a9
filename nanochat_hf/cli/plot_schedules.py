"""Draw the schedules of a run, or print them as a table.

python -m nanochat_hf.cli.plot_schedules --num-steps 3000 --output docs/schedules.png
"""

import argparse
from pathlib import Path

from nanochat_hf.config import user_errors
from nanochat_hf.training.pretraining import BaseSchedule
from nanochat_hf.training.schedules import Schedule, ScheduleConfig


def curves(num_steps: int, points: int = 200) -> dict[str, list[tuple[float, float]]]:
    """What trains by default, as pairs of progress and value, at `points` steps of a run of `num_steps`."""
    steps = [round(i * (num_steps - 1) / (points - 1)) for i in range(points)]
    base = Schedule(num_steps, BaseSchedule())
    sft = Schedule(num_steps, ScheduleConfig())
    series = {
        "base learning rate": base.lr,
        "SFT learning rate": sft.lr,
        "Muon momentum": base.momentum,
        "base weight decay": base.weight_decay,
    }
    return {name: [(step / num_steps, value(step)) for step in steps] for name, value in series.items()}


def draw(series: dict[str, list[tuple[float, float]]], num_steps: int, path: Path) -> None:
    """Write the curves as an image, in the format that the file's ending names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), constrained_layout=True)
    for name, points in series.items():
        axes.plot([x * num_steps for x, _ in points], [y for _, y in points], label=name)
    axes.set(xlabel="step", ylabel="multiplier; momentum as it is", ylim=(0, 1.05))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=120)


def table(series: dict[str, list[tuple[float, float]]]) -> str:
    """The curves as text: one row per progress, one column per schedule."""
    rows = ["progress  " + "  ".join(series)]
    for points in zip(*series.values(), strict=True):
        values = "  ".join(f"{y:>{len(name)}.3f}" for name, (_, y) in zip(series, points, strict=True))
        rows.append(f"{points[0][0]:>8.2f}  {values}")
    return "\n".join(rows)


@user_errors
def main() -> None:
    """Draw, or print a table if there is no --output."""
    parser = argparse.ArgumentParser(description="Draw the schedules of a run.")
    parser.add_argument("--num-steps", type=int, default=1000, help="optimizer steps of the run")
    parser.add_argument("--output", type=Path, help="image to write (png, svg, pdf); without it a table is printed")
    args = parser.parse_args()
    if args.num_steps < 1:
        parser.error(f"--num-steps {args.num_steps} must be at least 1")
    if args.output is None:
        print(table(curves(args.num_steps, points=11)))
        return
    draw(curves(args.num_steps), args.num_steps, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
