"""Import a checkpoint of the original nanochat.

python -m nanochat_hf.cli.import_nanochat --checkpoint-dir base_checkpoints/d12 --output runs/d12
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from nanochat_hf.config import parse, user_errors
from nanochat_hf.interop import Decisions, import_checkpoint
from nanochat_hf.interop.dates import CHOICES


@dataclass(frozen=True)
class ImportConfig:
    """What to import, and where to."""

    checkpoint_dir: str = field(metadata={"help": "folder with model_NNNNNN.pt and meta_NNNNNN.json"})
    output: str = field(metadata={"help": "new folder for the model and its tokenizer"})
    step: int | None = field(default=None, metadata={"help": "step of the checkpoint (default: the newest)"})
    tokenizer: str | None = field(
        default=None, metadata={"help": "folder with tokenizer.pkl (default: beside the weights, or ../../tokenizer)"}
    )
    recipe: str | None = field(
        default=None, metadata={"help": f"of which date it is, where its files leave that open: {', '.join(CHOICES)}"}
    )
    probe: str | None = field(
        default=None, metadata={"help": "a text or a file of text, on which losses decide what the files leave open"}
    )
    sequence_len: int | None = field(
        default=None, metadata={"help": "positions that the windows were trained for (default: the checkpoint's own)"}
    )


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Import, and say how large the model and its tokenizer are."""
    config, _ = parse([ImportConfig], argv, description=__doc__)
    decisions = Decisions(config.recipe, config.probe, config.sequence_len)
    model, tokenizer = import_checkpoint(config.checkpoint_dir, config.output, config.step, config.tokenizer, decisions)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters and {len(tokenizer)} tokens saved in {config.output}")


if __name__ == "__main__":
    main()
