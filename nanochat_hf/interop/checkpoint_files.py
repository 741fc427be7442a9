"""The files of a nanochat checkpoint: model_NNNNNN.pt, meta_NNNNNN.json, tokenizer.pkl."""

import json
import re
from pathlib import Path
from typing import Any

import torch

from .names import Weights


def newest(folder: Path) -> int:
    """The step of the newest checkpoint in a folder; ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"--checkpoint-dir {folder}: no such folder")
    steps = [int(found[1]) for p in folder.iterdir() if (found := re.fullmatch(r"model_(\d+)\.pt", p.name))]
    if not steps:
        raise ValueError(
            f"--checkpoint-dir {folder}: holds no model_NNNNNN.pt; give a folder such as base_checkpoints/d12"
        )
    return max(steps)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is --step right?") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); copy it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds {type(found).__name__}; it must be an object")
    return found


def read_weights(path: Path) -> Weights:
    """A state dict, without the prefix that torch.compile adds; no code of the file runs. ValueError for else."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is --step right?") from None
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise ValueError(f"{path}: not a file of tensors ({str(error).splitlines()[0][:100]}); copy it again") from None
    if not isinstance(found, dict) or not all(isinstance(n, str) and torch.is_tensor(v) for n, v in found.items()):
        raise ValueError(f"{path}: not a state dict; give the model file, not the optimizer's")
    return {name.removeprefix("_orig_mod."): value for name, value in found.items()}


def find_tokenizer(folder: Path, given: str | Path | None) -> Path:
    """tokenizer.pkl in the folder given, else beside the weights or where nanochat keeps it."""
    places = [Path(given)] if given else [folder, folder.resolve().parent.parent / "tokenizer"]
    for place in places:
        if (place / "tokenizer.pkl").is_file():
            return place / "tokenizer.pkl"
    raise ValueError(f"no tokenizer.pkl in {' or '.join(map(str, places))}; give its folder with --tokenizer")
