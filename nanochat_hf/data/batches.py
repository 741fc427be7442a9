"""The Protocol that planned, streamed and rolled-out batches share, so that the engine need not tell them apart."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from .collate import Batch
from .reports import DataReport


@runtime_checkable
class Batches(Protocol):
    """Endless micro-batches of this process, with exact state."""

    @property
    def report(self) -> DataReport:
        """What became of the rows of each source."""

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the present state on; the state counts batches handed out, not those made ahead."""

    def state_dict(self) -> dict[str, Any]:
        """The place after the batches handed out, and the identity of the data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at `state`; ValueError where the data is not the same."""


def without_targets(batch: Batch, rows: int) -> None:
    """Remove the targets of the last `rows` rows of a batch, in place."""
    if rows > 0:
        batch["shift_labels"][-rows:] = -100
