"""Documents longer than a row: one rule for planned and streamed data."""

from dataclasses import dataclass

import numpy as np

from .reports import SourceReport

OVERLONG = ("truncate", "split", "drop")
Span = tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """Which parts of a rendered conversation go into rows of `capacity` tokens, by the policy `overlong`.

    With `all_tokens` every token is a target; without it a part that has no target is left out. `user_start` is the id
    before which a conversation may be split, `bos` the id that begins each part after the first.
    """

    capacity: int
    bos: int
    user_start: int
    overlong: str = "truncate"
    all_tokens: bool = False

    def __post_init__(self) -> None:
        if self.overlong not in OVERLONG:
            raise ValueError(f"overlong={self.overlong!r} is unknown; choose from {', '.join(OVERLONG)}")

    def spans(self, ids: np.ndarray, mask: np.ndarray, report: SourceReport) -> list[Span]:
        """The parts of a conversation that are trained on; `report` counts what was cut or left out."""
        pieces = [(0, len(ids))]
        if len(ids) > self.capacity:
            turns = [0, *np.flatnonzero(ids == self.user_start)[1:].tolist()]
            pieces = cut(len(ids), turns, self.capacity, self.overlong)
            report.dropped += not pieces
            report.split += len(pieces) > 1
            report.truncated += bool(pieces) and sum(b - a for a, b in pieces) < len(ids)
        kept = [(a, b) for a, b in pieces if self.all_tokens or mask[a:b].any()]
        report.untrained += len(pieces) - len(kept)
        return kept


def cut(length: int, turns: list[int], capacity: int, policy: str) -> list[Span]:
    """The parts of an over-long conversation that are kept.

    `turns` are the positions where a user's message begins, the first being 0. "split" cuts before a user's message, so
    that no answer loses its question; each later part needs room for a bos, and a single turn that is too long is
    truncated. "truncate" keeps the beginning, "drop" keeps nothing.

    >>> cut(10, turns=[0, 4, 7], capacity=7, policy="split")
    [(0, 7), (7, 10)]
    """
    if policy == "drop":
        return []
    if policy == "truncate":
        return [(0, capacity)]
    spans, start, ends = [], 0, [*turns[1:], length]
    for here, following in zip(ends, [*ends[1:], None], strict=True):
        room = capacity - (start > 0)
        if following is None or following - start > room:
            spans.append((start, min(here, start + room)))
            start = here
    return spans
