"""The state in a checkpoint's files, read and checked.

What is damaged or foreign is named in one line, and nothing of it is used.
"""

import contextlib
import json
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .integrity import first_not_finite
from .trainer import TrainState

# What reading or using a value of the wrong kind raises.
_MISUSE = (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Facts:
    """What trainer.json says.

    The loop's counters, the processes, settings and trackers of the run that wrote it, its callbacks' states.
    """

    state: dict[str, Any]
    num_processes: int
    settings: dict[str, Any] = field(default_factory=dict)
    trackers: dict[str, str] = field(default_factory=dict)
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)


@contextlib.contextmanager
def blamed(path: Path) -> Generator[None]:
    """Whatever cannot be used in the body is a ValueError in one line that names `path`."""
    try:
        yield
    except _MISUSE as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"--resume {path}: damaged or not ours ({type(error).__name__}: {reason}); give an older checkpoint"
        ) from None


def read_facts(folder: Path) -> Facts:
    """trainer.json of a checkpoint; ValueError where it is not what this program writes."""
    path = folder / "trainer.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--resume {path}: damaged ({error}); give an older checkpoint") from None
    wrong = _wrong_facts(found)
    if wrong:
        raise ValueError(f"--resume {path}: damaged or not ours ({wrong}); give an older checkpoint")
    known = {part.name for part in fields(Facts)}
    return Facts(**{name: value for name, value in found.items() if name in known and value is not None})


def _wrong_facts(found):
    # what is wrong with the contents of trainer.json, None where nothing is
    if not isinstance(found, dict) or not isinstance(found.get("state"), dict):
        return "it holds no state"
    if not _count(found.get("num_processes"), 1):
        return f"num_processes is {found.get('num_processes')!r}"
    for name in ("settings", "trackers", "callbacks"):
        if not isinstance(found.get(name) or {}, dict):
            return f"{name} is {type(found[name]).__name__}"
    if not all(isinstance(value, dict) for value in (found.get("callbacks") or {}).values()):
        return "a callback's state is no mapping"
    state, counters = found["state"], [part.name for part in fields(TrainState)]
    unknown = sorted(set(state) - set(counters))
    if unknown or "step" not in state:
        return f"unknown {', '.join(unknown)}" if unknown else "it has no step"
    for name, value in state.items():
        if not _amount(value) if name == "seconds" else not _count(value):
            return f"{name} is {value!r}"
    return None


def _count(value, least=0):
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _amount(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def read_weights(folder: Path, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint.

    ValueError where they are not those of a model with the tensors `own`, or not finite.
    """
    weights = {}
    for part in sorted(folder.glob("*.safetensors")):
        try:
            weights |= load_file(part)
        except (SafetensorError, *_MISUSE) as error:
            raise ValueError(f"--resume {part}: damaged ({error}); give an older checkpoint") from None
    if not weights:
        raise ValueError(
            f"--resume {folder}: holds no model weights, so it is no checkpoint of this program; give another folder"
        )
    differing = sorted(
        name
        for name in own.keys() | weights.keys()
        if name not in own or name not in weights or tuple(own[name].shape) != tuple(weights[name].shape)
    )
    if differing:
        more = f" and {len(differing) - 1} more tensors differ" if len(differing) > 1 else " differs"
        raise ValueError(f"--resume {folder}: another architecture; {differing[0]}{more}; give --model {folder}")
    kinds = sorted({str(value.dtype) for value in weights.values() if not value.is_floating_point()})
    if kinds:
        raise ValueError(f"--resume {folder}: its weights are {kinds[0]}, no floats; give another folder")
    bad = first_not_finite(weights.items())
    if bad:
        raise ValueError(f"--resume {folder}: {bad} is not finite; give an older checkpoint")
    return weights


def read_plain(path: Path, *keys: str) -> dict[str, Any]:
    """A file of tensors and plain values, a mapping with `keys`.

    ValueError where it is damaged, missing or something else.

    Nothing in it can run: checkpoints come from the Hub too, and a pickle may hold any code.
    """
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # unpickling garbage can raise anything
        reason = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"--resume {path}: damaged, missing or not ours ({''.join(reason)}); give an older checkpoint"
        ) from None
    lacking = [key for key in keys if not isinstance(found, dict) or key not in found]
    if lacking:
        raise ValueError(f"--resume {path}: not ours (it has no {lacking[0]!r}); give an older checkpoint")
    return found


def check_optimizer(path: Path, state: Any, groups: list[dict[str, Any]]) -> None:
    """ValueError where an optimizer's saved state is not of parameters like those in `groups`, or not finite."""
    with blamed(path):
        shapes = [tuple(param.shape) for group in groups for param in group["params"]]
        ids = [index for group in state["param_groups"] for index in group["params"]]
        if sorted(ids) != list(range(len(shapes))):
            raise ValueError(f"it is of {len(ids)} parameters, this model has {len(shapes)}")
        for group in state["param_groups"]:
            for name in ("lr", "initial_lr", "weight_decay", "initial_weight_decay", "momentum"):
                if not _amount(group[name]):
                    raise ValueError(f"{name} is {group[name]!r}")
        shape_of = dict(zip(ids, shapes, strict=True))
        for index, values in state["state"].items():
            for name, value in values.items():
                _check_moment(f"{name} of parameter {index}", value, shape_of[index])


def _check_moment(name, value, shape):
    # a count, a tensor like the parameter, or one that broadcasts to it (Muon keeps a row or a column)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise ValueError(f"{name} is {type(value).__name__}, no tensor of floats")
    if value.ndim and torch.broadcast_shapes(tuple(value.shape), shape) != torch.Size(shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, the parameter {shape}")
    if not value.isfinite().all():
        raise ValueError(f"{name} is not finite")
