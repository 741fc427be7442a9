"""Draw the pictures of the docs from records and from the code itself (python -m scripts.pictures [NAME …]).

No figure of a picture stands in this file: curves come from docs/records, schedules and packing from the functions that
training calls. The same records give the same bytes.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_hf.cli.plot_schedules import curves
from nanochat_hf.cli.record_parts import METRICS, Record, read_record
from nanochat_hf.data.packing import plan_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASE_CURVE = "2026-11-30-quickstart-base-curve"
LENGTHS = "2026-11-30-conversation-lengths"
MUON = "2026-11-25-muon-vs-adamw"
STEPS = "Training at depth"  # claims that begin so are drawn over time
ROW = 321  # positions of the quickstart's rows, and one for the last target
SCHEDULE_STEPS = 1000
BLUE, ORANGE, GREY = "#1f77b4", "#e6550d", "#e5e5e5"
TASKS = {"simple_spelling": "#1f77b4", "spelling_bee": "#e6550d", "calculator": "#31a354", "identity": "#756bb1"}
STOPS = (  # (what, where) of the data's way, in order; the second of a pair is the module that does it
    ("row of a data set", "data.sources"),
    ("conversation", "data.formats"),
    ("ids and mask", "data.documents"),
    ("plan of rows", "data.packing"),
    ("batch", "data.collate"),
    ("step", "training.trainer"),
    ("new weights", "optim"),
    ("chat", "generation"),
)


def loss_curve(records: Path) -> "Figure":
    """Training loss and bits per byte of the quickstart's base model."""
    entries = read_record(records / BASE_CURVE).tables[METRICS].dicts()
    figure, (left, right) = _figure(9, 3.2, 2)
    for axes, name, unit, color in (
        (left, "train/loss", "nats per token", BLUE),
        (right, "val/bpb", "bits per byte", ORANGE),
    ):
        points = [(e["step"], e[name]) for e in entries if e[name] is not None]
        axes.plot(*zip(*points, strict=True), color=color, marker=".")
        axes.set(title=name, xlabel="step", ylabel=unit)
    return figure


def muon_vs_adamw(records: Path) -> "Figure":
    """Held-out bits per byte of both optimizers at depth 16, and the search of AdamW's rate."""
    tables = read_record(records / MUON).tables
    figure, (left, right) = _figure(9, 3.6, 2)
    curve, search = tables["curves"], tables["search"]
    for name, color in (("Muon", BLUE), ("AdamW", ORANGE)):
        left.plot(curve.numbers("tokens"), curve.numbers(name), marker=".", color=color, label=name)
    left.set(title="depth 16, held-out text", xlabel="million tokens", ylabel="bits per byte")
    left.legend(frameon=False)
    rates = search.numbers("matrix_lr")
    right.plot(rates, search.numbers("bpb"), marker="o", color=ORANGE)
    right.set(title="AdamW after 61 steps", xlabel="learning rate", ylabel="bits per byte", xscale="log")
    right.set_xticks(rates, labels=[f"{rate:g}" for rate in rates])
    right.set_xticks([], minor=True)
    return figure


def schedules(records: Path) -> "Figure":
    """Every multiplier that changes during a run, as training computes it."""
    figure, (axes,) = _figure(8, 3.6, 1)
    for name, points in curves(SCHEDULE_STEPS).items():
        axes.plot([x * SCHEDULE_STEPS for x, _ in points], [y for _, y in points], label=name)
    axes.set(xlabel=f"step of {SCHEDULE_STEPS:,}", ylabel="multiplier; momentum as it is", ylim=(0, 1.05))
    axes.legend(loc="lower left", frameon=False)
    return figure


def packing(records: Path) -> "Figure":
    """The same conversations one a row and as `plan_rows` packs them; what is grey is padding."""
    table = read_record(records / LENGTHS).tables["lengths"]
    rows, lengths = table.dicts(), [int(length) for length in table.numbers("length")]
    plans = {
        "one conversation a row": [[i] for i in range(len(lengths))],
        "packed by plan_rows": plan_rows(lengths, ROW),
    }
    figure, panels = _figure(9, 4, 2)
    for axes, (title, plan) in zip(panels, plans.items(), strict=True):
        for y, row in enumerate(plan):
            axes.barh(y, ROW, color=GREY, height=0.9)
            start = 0
            for index in row:
                color = TASKS[str(rows[index]["task"])]
                axes.barh(y, lengths[index], left=start, color=color, height=0.9, edgecolor="white", linewidth=0.5)
                start += lengths[index]
        padding = 1 - sum(lengths) / (ROW * len(plan))
        axes.set(title=f"{title}: {len(plan)} rows, {padding:.0%} padding", xlabel="position", yticks=[], xlim=(0, ROW))
        axes.invert_yaxis()
        axes.grid(False)
    figure.legend(handles=_swatches(TASKS | {"padding": GREY}), loc="outside lower center", ncols=5, frameon=False)
    return figure


def speed(records: Path) -> "Figure":
    """Tokens per second of whole steps on an H100 by the records' dates: each claim's range over cards."""
    ordered = sorted((read_record(path) for path in records.iterdir() if path.is_dir()), key=lambda record: record.date)
    found: dict[str, list[tuple[Record, list[float]]]] = {}
    for record in ordered:
        for text, values in _speeds(record).items():
            found.setdefault(text, []).append((record, values))
    shown = {text: points for text, points in sorted(found.items()) if len(points) > 2}
    drawn = [record for record in ordered if any(record is other for points in shown.values() for other, _ in points)]
    places = {record.folder: place for place, record in enumerate(drawn)}
    figure, panels = _figure(9, 4.4, 2)
    for axes, depth in zip(panels, ("depth 12", "depth 20"), strict=True):
        for text, points in shown.items():
            if depth in text:
                middle = [(min(values) + max(values)) / 2e3 for _, values in points]
                spread = [(max(values) - min(values)) / 2e3 for _, values in points]
                name = text.split(", ", 2)[2].removesuffix(", one H100")
                x = [places[record.folder] for record, _ in points]
                axes.errorbar(x, middle, yerr=spread, marker=".", capsize=3, label=name)
        axes.set(title=depth, xlabel="record of", ylabel="thousand tokens/s")
        axes.set_xticks(list(places.values()), labels=[f"{record.date:%m-%d}" for record in drawn])
        axes.legend(frameon=False, fontsize=7)
    return figure


def data_way(records: Path) -> "Figure":
    """The stops that a row of a data set passes on its way to a chat, with the module of each."""
    from matplotlib.patches import FancyBboxPatch

    figure, (axes,) = _figure(10, 3, 1)
    half = len(STOPS) // 2
    for number, (what, where) in enumerate(STOPS):
        column, line = number % half, number // half
        x, y = 2.5 * column, -1.6 * line
        axes.add_patch(FancyBboxPatch((x, y), 1.8, 0.8, boxstyle="round,pad=0.05", facecolor="#deebf7", edgecolor=BLUE))
        axes.text(x + 0.9, y + 0.5, f"{number + 1} {what}", ha="center", va="center", fontsize=10)
        axes.text(x + 0.9, y + 0.2, where, ha="center", va="center", fontsize=8, color="#636363", family="monospace")
        if column < half - 1:
            axes.annotate("", (x + 2.4, y + 0.4), (x + 1.9, y + 0.4), arrowprops={"arrowstyle": "->", "color": BLUE})
        elif number < len(STOPS) - 1:
            axes.plot([x + 0.9, x + 0.9, 0.9], [y - 0.1, y - 0.4, y - 0.4], color=BLUE, linewidth=1)
            axes.annotate("", (0.9, y - 0.72), (0.9, y - 0.4), arrowprops={"arrowstyle": "->", "color": BLUE})
    axes.set(xlim=(-0.2, 2.5 * half - 0.4), ylim=(-1.8, 1))
    axes.axis("off")
    return figure


PICTURES: dict[str, Callable[[Path], "Figure"]] = {
    "loss_curve": loss_curve,
    "muon_vs_adamw": muon_vs_adamw,
    "schedules": schedules,
    "packing": packing,
    "speed": speed,
    "data_way": data_way,
}


def _figure(width: float, height: float, panels: int) -> tuple["Figure", list["Axes"]]:
    """An empty figure of so many panels side by side, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for one in axes:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _swatches(colors: dict[str, str]) -> list:
    """Legend entries, one a colour."""
    from matplotlib.patches import Patch

    return [Patch(color=color, label=name.replace("_", " ")) for name, color in colors.items()]


def _speeds(record: Record) -> dict[str, list[float]]:
    """{claim: its values of the column speed} of the claims about whole steps on one H100."""
    found = {}
    for claim in record.claims:
        if claim.claim.startswith(STEPS) and "speed" in claim.show and "one H100" in claim.claim:
            rows = [
                row for row in record.tables[claim.table].dicts() if all(row[k] == v for k, v in claim.where.items())
            ]
            found[claim.claim.split(" (MFU")[0]] = [float(row["speed"]) for row in rows if row["speed"] is not None]
    return found


def write(name: str, records: Path, folder: Path) -> Path:
    """Draw one picture as SVG, the same bytes each time."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9}):
        path = folder / f"{name}.svg"
        PICTURES[name](records).savefig(path, metadata={"Date": None})
    text = path.read_text()
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")
    return path


def main(argv: list[str] | None = None) -> None:
    """Draw all pictures, or those that are named."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the docs from records and from the code.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"what to draw (default: all of {', '.join(PICTURES)})"
    )
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of records/ and pictures/")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in PICTURES]:
        parser.error(f"there is no picture {unknown[0]!r}; choose from {', '.join(PICTURES)}")
    (args.docs / "pictures").mkdir(exist_ok=True)
    for name in args.names or PICTURES:
        print(f"wrote {write(name, args.docs / 'records', args.docs / 'pictures')}")


if __name__ == "__main__":
    main()
