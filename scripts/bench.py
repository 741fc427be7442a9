"""Run a benchmark, which prints a table.

python -m scripts.bench NAME [flags]; without a name it lists the benchmarks.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from nanochat_hf.config import user_errors


def names() -> list[str]:
    """The benchmarks: one file each in scripts/benchmarks."""
    return sorted(
        path.stem
        for path in (Path(__file__).parent / "benchmarks").glob("*.py")
        if path.stem not in ("__init__", "measure")
    )


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark that the first word names."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in names():
        print(f"usage: python -m scripts.bench {{{','.join(names())}}} [flags]", file=sys.stderr)
        sys.exit(0 if argv and argv[0] in ("-h", "--help") else 2)
    importlib.import_module(f"scripts.benchmarks.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    main()
