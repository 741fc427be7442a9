"""Import a checkpoint of the original nanochat.

python -m nanochat_hf.cli.import_nanochat --checkpoint-dir base_checkpoints/d12 --output runs/d12
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from nanochat_hf.config import parse, user_errors
from nanochat_hf.interop import import_checkpoint


@dataclass(frozen=True)
class ImportConfig:
    """What to import, and where to."""

    checkpoint_dir: str = field(metadata={"help": "folder with model_NNNNNN.pt and meta_NNNNNN.json"})
    output: str = field(metadata={"help": "new folder for the model and its tokenizer"})
    step: int | None = field(default=None, metadata={"help": "step of the checkpoint (default: the newest)"})
    tokenizer: str | None = field(
        default=None, metadata={"help": "folder with tokenizer.pkl (default: beside the weights, or ../../tokenizer)"}
    )


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Import, and say how large the model and its tokenizer are."""
    config, _ = parse([ImportConfig], argv, description=__doc__)
    model, tokenizer = import_checkpoint(config.checkpoint_dir, config.output, config.step, config.tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters and {len(tokenizer)} tokens saved in {config.output}")


if __name__ == "__main__":
    main()
