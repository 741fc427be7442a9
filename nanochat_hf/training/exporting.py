"""Finished models: final/ and best/."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from nanochat_hf.interop.folder import export
from nanochat_hf.machine.weights import whole_weights

from .checkpoint import refuse_not_finite
from .together import on_main

if TYPE_CHECKING:
    from .trainer import Trainer


def export_model(
    trainer: "Trainer", tokenizer: PreTrainedTokenizerBase, folder: Path, notes: Mapping[str, str] | None = None
) -> None:
    """Write the model as `from_pretrained` reads it, all ranks together; `notes`: {name: text} of further files.

    Diverged, on all ranks, where a weight is not finite; OSError, on all ranks, where the disk refuses. `folder` stays
    what it was then.
    """
    refuse_not_finite(trainer, folder.parent)
    weights = whole_weights(trainer.raw_model)
    try:
        on_main(trainer.accelerator, lambda: export(trainer.raw_model, tokenizer, folder, weights, notes=notes))
    except OSError as error:
        raise OSError(
            f"{folder} could not be written ({error}); the checkpoints are whole: free space, then --resume auto"
        ) from None
