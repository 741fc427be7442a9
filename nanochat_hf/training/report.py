"""What a finished run leaves to read: report.md, and curves.png from metrics.jsonl."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat_hf.machine.durable import write_whole

from .tracking import read_metrics

CURVES = (
    ("train/loss", "loss (nats per target, smoothed)"),
    ("reward", "reward, mean of sampled answers"),
    ("val/bpb", "validation, bits per byte"),
    ("train/lr_multiplier", "lr multiplier"),
)


def curves(entries: Sequence[Mapping[str, Any]], path: str | Path) -> bool:
    """Draw loss, bpb and lr over steps as a PNG; False when there is nothing to draw or no matplotlib."""
    series = [(label, [(e["step"], e[key]) for e in entries if e.get(key) is not None]) for key, label in CURVES]
    series = [(label, points) for label, points in series if points]
    if not series:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(4.5 * len(series), 3.2), layout="constrained")
    for axes, (label, points) in zip(figure.subplots(1, len(series), squeeze=False)[0], series, strict=True):
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
        axes.set(title=label, xlabel="step")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return True


def write_report(output_dir: str | Path, title: str, settings: Mapping[str, Any], figures: Mapping[str, Any]) -> Path:
    """Write report.md (and curves.png) into `output_dir`; `figures` and `settings` become tables.

    Returns the report's path.
    """
    folder = Path(output_dir)
    metrics = folder / "metrics.jsonl"
    drawn = metrics.is_file() and curves(read_metrics(metrics), folder / "curves.png")
    lines = [
        f"# {title}",
        "",
        "| result | value |",
        "|---|---|",
        *(f"| {key} | {_shown(value)} |" for key, value in figures.items()),
        "",
    ]
    if drawn:
        lines += ["![curves](curves.png)", ""]
    samples = folder / "samples.md"
    if samples.is_file():
        lines += ["## Samples of the last step", "", samples.read_text(), ""]
    lines += [
        "## Settings",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {key} | {_shown(value)} |" for key, value in settings.items()),
    ]
    path = folder / "report.md"
    write_whole(path, "\n".join(lines) + "\n")
    return path


def _shown(value):
    text = f"{value:,.5g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
