"""Whether a checkpoint is what was written: a checksum of each file, and no weight that is not finite."""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from nanochat_hf.machine.durable import write_whole

CHECKSUMS = "checksums.json"
THREADS = 4  # that hash at the same time: hashlib lets go of Python's lock


class Diverged(ArithmeticError):
    """Training has led to weights that are not finite: there is nothing to save or export."""


def checksums(folder: Path) -> dict[str, str]:
    """{name: SHA-256} of the files in `folder`, but for the list itself."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _checksum(folder / name), names), strict=True))


def _checksum(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Write the checksums of all files in `folder` beside them."""
    write_whole(folder / CHECKSUMS, json.dumps(checksums(folder), indent=2) + "\n")


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder: "optimizer.pt differs from its checksum".

    None where nothing is, or it was never sealed.
    """
    path = folder / CHECKSUMS
    if not path.is_file():  # a checkpoint of before checksums
        return None
    try:
        expected = json.loads(path.read_text())
        missing = sorted(name for name in expected if not (folder / name).is_file())
        if missing:
            return f"{missing[0]} is missing"
        found = checksums(folder)
        differing = [name for name, value in expected.items() if found[name] != value]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        return f"{CHECKSUMS} cannot be used ({' '.join(str(error).split())})"
    return f"{', '.join(differing)} differs from its checksum" if differing else None


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The first name whose tensor holds NaN or infinity; None where all are finite.

    Of a split tensor this process looks at its part.

    >>> first_not_finite([("a", torch.ones(2)), ("b", torch.tensor([1.0, float("nan")]))])
    'b'
    """
    named = [(name, getattr(value, "_local_tensor", value)) for name, value in tensors if value.is_floating_point()]
    if not named:
        return None
    finite = torch.stack([value.isfinite().all().to(named[0][1].device) for _, value in named]).tolist()
    return next((name for (name, _), good in zip(named, finite, strict=True) if not good), None)
