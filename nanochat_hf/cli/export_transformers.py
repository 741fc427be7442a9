"""Write a model folder as transformers' own NanoChat, which needs no remote code.

python -m nanochat_hf.cli.export_transformers --model runs/imported --output runs/plain
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from nanochat_hf.config import parse, user_errors
from nanochat_hf.interop.to_transformers import export_to_transformers


@dataclass(frozen=True)
class ExportConfig:
    """What to export, and where to."""

    model: str = field(metadata={"help": "model folder, without any part that nanochat got after October 2025"})
    output: str = field(metadata={"help": "new folder"})


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Export, and say where to."""
    config, _ = parse([ExportConfig], argv, description=__doc__)
    print(f"saved {export_to_transformers(config.model, config.output)}")


if __name__ == "__main__":
    main()
