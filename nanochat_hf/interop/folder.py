"""A finished model's folder, as `from_pretrained` reads it."""

import os
import shutil
from pathlib import Path


def export(model, tokenizer, folder, weights=None):
    """Write a model folder that `from_pretrained` loads, whole or not at all. `weights`: a state dict in place of the model's own."""
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, state_dict=weights)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    return folder
