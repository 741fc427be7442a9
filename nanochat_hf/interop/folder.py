"""A finished model's folder, as `from_pretrained` reads it."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nanochat_hf.machine.durable import whole_folder

TABLES = ("lm_head.weight", "embed_tokens.weight")  # the ends of the names of tables with a row a token, and:
VALUE_TABLES = "value_embeds."


def without_padding(weights: dict[str, torch.Tensor], vocab_size: int) -> dict[str, torch.Tensor]:
    """A state dict whose tables have a row for each token and no more."""
    tables = {name for name in weights if name.endswith(TABLES) or VALUE_TABLES in name}
    return {name: value[:vocab_size].clone() if name in tables else value for name, value in weights.items()}


@contextmanager
def _exact_rows(config: PreTrainedConfig) -> Generator[None]:
    padded, config.pad_vocab_to_multiple_of = config.pad_vocab_to_multiple_of, 1
    try:
        yield
    finally:
        config.pad_vocab_to_multiple_of = padded


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    weights: dict[str, torch.Tensor] | None = None,
    keep_padding: bool = False,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write a model folder that `from_pretrained` loads, whole or not at all.

    `weights`: a state dict in place of the model's own; `notes`: {name: text} of further files. Its tables have exactly
    `vocab_size` rows, as vLLM and others expect; the padding of training is left out, unless `keep_padding`, which
    checkpoints of the original nanochat need to go back as they were. `model` itself stays padded.
    """
    folder = Path(folder)
    weights = model.state_dict() if weights is None else weights
    with whole_folder(folder) as partial:
        if keep_padding or model.config.pad_vocab_to_multiple_of == 1:
            model.save_pretrained(partial, state_dict=weights)
        else:
            with _exact_rows(model.config):
                model.save_pretrained(partial, state_dict=without_padding(weights, model.config.vocab_size))
        tokenizer.save_pretrained(partial)
        for name, text in (notes or {}).items():
            (partial / name).write_text(text)
    return folder
