"""Write a model folder as a checkpoint of the original nanochat.

python -m nanochat_hf.cli.export_nanochat --model runs/sft/final --output chatsft_checkpoints/d12
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from nanochat_hf.config import parse, user_errors
from nanochat_hf.interop import export_checkpoint


@dataclass(frozen=True)
class ExportConfig:
    """What to export, and where to."""

    model: str = field(metadata={"help": "model folder"})
    output: str = field(metadata={"help": "folder for model_NNNNNN.pt and meta_NNNNNN.json"})
    step: int | None = field(
        default=None, metadata={"help": "step to name the files by (default: that of the import, else 0)"}
    )
    tokenizer_output: str | None = field(
        default=None, metadata={"help": "folder for tokenizer.pkl and token_bytes.pt (default: --output)"}
    )

    def __post_init__(self):
        if self.step is not None and self.step < 0:
            raise ValueError(f"--step {self.step} must not be negative")


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Export, and say where to."""
    config, _ = parse([ExportConfig], argv, description=__doc__)
    print(f"saved {export_checkpoint(config.model, config.output, config.step, config.tokenizer_output)}")


if __name__ == "__main__":
    main()
