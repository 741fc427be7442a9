"""Draw the schedules of a run as an SVG file, or print them as a table.

python -m scripts.plot_schedules --num-steps 1000 --output schedules.svg
"""

import argparse
from pathlib import Path

from nanochat_hf import schedules

WIDTH, HEIGHT, MARGIN = 720, 320, 40
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728")


def curves(num_steps: int, points: int = 200) -> dict[str, list[tuple[float, float]]]:
    """Each schedule as (progress, value) pairs of a run of `num_steps` steps; `curves(10, 2)` gives progress 0 and 1."""
    grid = [i / (points - 1) for i in range(points)]
    return {
        "base learning rate": [(x, schedules.base_lr(x)) for x in grid],
        "SFT learning rate": [(x, schedules.sft_lr(x)) for x in grid],
        "Muon momentum": [(x, schedules.muon_momentum(round(x * num_steps))) for x in grid],
        "base weight decay": [(x, schedules.weight_decay(x)) for x in grid],
    }


def svg(series: dict[str, list[tuple[float, float]]], num_steps: int) -> str:
    """The curves as the text of an SVG image: progress to the right, value from 0 to 1 upwards."""
    inner, tall = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{MARGIN} {MARGIN}V{HEIGHT - MARGIN}H{WIDTH - MARGIN}" fill="none" stroke="black"/>',
        f'<text x="{MARGIN - 12}" y="{MARGIN + 4}">1</text><text x="{MARGIN - 12}" y="{HEIGHT - MARGIN + 4}">0</text>',
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 12}" text-anchor="end">step {num_steps}</text>',
    ]
    for i, (name, pairs) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = " ".join(f"{MARGIN + x * inner:.1f},{HEIGHT - MARGIN - y * tall:.1f}" for x, y in pairs)
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        lines.append(f'<text x="{MARGIN + 10}" y="{HEIGHT - MARGIN - 12 - 16 * i}" fill="{colour}">{name}</text>')
    return "\n".join([*lines, "</svg>", ""])


def table(series: dict[str, list[tuple[float, float]]]) -> str:
    """The curves as text: one row per progress, one column per schedule."""
    rows = ["progress  " + "  ".join(series)]
    for points in zip(*series.values(), strict=True):
        values = "  ".join(f"{y:>{len(name)}.3f}" for name, (_, y) in zip(series, points, strict=True))
        rows.append(f"{points[0][0]:>8.2f}  {values}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the schedules of a run.")
    parser.add_argument("--num-steps", type=int, default=1000, help="optimizer steps of the run")
    parser.add_argument("--output", type=Path, help="SVG file to write; without it a table is printed")
    args = parser.parse_args()
    if args.num_steps < 1:
        parser.error(f"--num-steps {args.num_steps} must be at least 1")
    if args.output is None:
        print(table(curves(args.num_steps, points=11)))
        return
    args.output.write_text(svg(curves(args.num_steps), args.num_steps))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
