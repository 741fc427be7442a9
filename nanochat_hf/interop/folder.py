"""A finished model's folder, as `from_pretrained` reads it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TABLES = ("lm_head.weight", "embed_tokens.weight")  # the ends of the names of tables with a row a token, and:
VALUE_TABLES = "value_embeds."


def without_padding(weights: dict, vocab_size: int) -> dict:
    """A state dict whose tables have a row for each token and no more."""
    tables = {name for name in weights if name.endswith(TABLES) or VALUE_TABLES in name}
    return {name: value[:vocab_size].clone() if name in tables else value for name, value in weights.items()}


@contextmanager
def _exact_rows(config) -> Iterator[None]:
    padded, config.pad_vocab_to_multiple_of = config.pad_vocab_to_multiple_of, 1
    try:
        yield
    finally:
        config.pad_vocab_to_multiple_of = padded


def export(model, tokenizer, folder, weights=None, keep_padding=False) -> Path:
    """Write a model folder that `from_pretrained` loads, whole or not at all. `weights`: a state dict in place of the model's own.

    Its tables have exactly `vocab_size` rows, as vLLM and others expect; the padding of training is left out, unless
    `keep_padding`, which checkpoints of the original nanochat need to go back as they were. `model` itself stays padded.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    weights = model.state_dict() if weights is None else weights
    if keep_padding or model.config.pad_vocab_to_multiple_of == 1:
        model.save_pretrained(partial, state_dict=weights)
    else:
        with _exact_rows(model.config):
            model.save_pretrained(partial, state_dict=without_padding(weights, model.config.vocab_size))
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    return folder
