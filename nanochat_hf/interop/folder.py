"""A finished model's folder, as `from_pretrained` reads it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nanochat_hf.machine.durable import whole_folder


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    weights: dict[str, torch.Tensor] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write a model folder that `from_pretrained` loads, whole or not at all.

    `weights`: a state dict in place of the model's own; `notes`: {name: text} of further files.
    """
    folder = Path(folder)
    with whole_folder(folder) as partial:
        model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        for name, text in (notes or {}).items():
            (partial / name).write_text(text)
    return folder
