"""What planned, streamed and rolled-out batches share, so that the engine knows no kind."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from .collate import Batch
from .reports import DataReport


@runtime_checkable
class Batches(Protocol):
    """Endless micro-batches of this process, with exact state."""

    report: DataReport

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the present state on; each one handed out moves it, however many are made ahead."""

    def state_dict(self) -> dict[str, Any]:
        """The place after the batches handed out, and what tells this data from other data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there; ValueError where the data is not the same."""


def without_targets(batch: Batch, rows: int) -> None:
    """Take the targets out of the last `rows` rows of a batch."""
    if rows > 0:
        batch["shift_labels"][-rows:] = -100


def divided(batches: Sequence[Batch], rank: int, world_size: int) -> list[Batch]:
    """The share of one process in validation batches that all of them have made: the number must not depend on how many there are.

    Each gets as many rows, since evaluation of split models is a collective: where they do not divide, some get a row
    without a target.
    """
    keys = set.intersection(*(set(batch) for batch in batches))  # of a stream some batches may have loss_weights
    rows = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0] if key in keys}
    missing = -len(rows["input_ids"]) % world_size
    if missing:
        rows = {key: torch.cat((value, value[:1].expand(missing, -1))) for key, value in rows.items()}
        without_targets(rows, missing)
    own = {key: value[rank::world_size] for key, value in rows.items()}
    size = len(batches[0]["input_ids"])
    return [
        {key: value[start : start + size] for key, value in own.items()}
        for start in range(0, len(own["input_ids"]), size)
    ]
