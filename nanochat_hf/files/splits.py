"""Which rows of a data set are meant: "train[:90%]" or start and rows → ranges of row numbers.

A range is (first, stop); stop None means "to the end". Ranges stay in the order in which they were written.
"""

import re
from dataclasses import dataclass
from decimal import Decimal

Range = tuple[int, int | None]
BOUND = r"-?\d[\d_]*(?:\.\d+)?%?"
PART = re.compile(rf"(?P<name>[\w.-]+)(?:\[\s*(?P<first>{BOUND})?\s*:\s*(?P<stop>{BOUND})?\s*\])?")


@dataclass(frozen=True)
class SplitPart:
    """One part of the text of a split: `name`, and the bounds as written ("90%", "-10", None)."""

    name: str
    first: str | None = None
    stop: str | None = None

    @property
    def counted(self) -> bool:
        """Whether the rows must be counted to know the bounds: percentages, and numbers from the end."""
        return any(bound is not None and (bound.endswith("%") or bound.startswith("-")) for bound in self._bounds)

    @property
    def _bounds(self) -> tuple[str | None, str | None]:
        return self.first, self.stop

    def range(self, count: int | None) -> Range:
        """The range of this part in a split of `count` rows; `count` may be None unless `counted`.

        >>> SplitPart("train", "90%").range(57), SplitPart("train", "10", "20").range(None)
        ((51, 57), (10, 20))
        """
        first, stop = (_place(bound, count) for bound in self._bounds)
        if count is None:
            return first or 0, stop
        return min(first or 0, count), count if stop is None else min(stop, count)


def parse_split(text: str) -> list[SplitPart]:
    """The parts of a split, which are joined by "+"; ValueError for text of another form.

    >>> parse_split("train[:10%]+test")
    [SplitPart(name='train', first=None, stop='10%'), SplitPart(name='test', first=None, stop=None)]
    """
    parts = []
    for piece in text.split("+"):
        match = PART.fullmatch(piece.strip())
        bounds = () if match is None else (match["first"], match["stop"])
        if match is None or any(b and "." in b and not b.endswith("%") for b in bounds):
            raise ValueError(f"split {text!r} cannot be read; write train, train[:90%], train[100:200] or train+test")
        parts.append(SplitPart(match["name"], *bounds))
    return parts


def _place(bound: str | None, count: int | None) -> int | None:
    if bound is None:
        return None
    if bound.endswith("%"):
        share = Decimal(bound[:-1].replace("_", ""))
        if not -100 <= share <= 100:
            raise ValueError(f"{bound} lies outside of the data; percentages go from -100 to 100")
        place = round(share * (count or 0) / 100)  # as datasets rounds: to the closest row
    else:
        place = int(bound)
    return max(0, place + (count or 0)) if bound.startswith("-") else place


def within(ranges: list[Range], start: int, rows: int | None) -> list[Range]:
    """Rows `start` to `start + rows` of all `ranges` together, counted from 0.

    >>> within([(10, 20), (50, None)], 5, 8)
    [(15, 20), (50, 53)]
    """
    kept: list[Range] = []
    skip, left = start, rows
    for first, stop in ranges:
        size = None if stop is None else max(0, stop - first)
        if size is not None and skip >= size:
            skip -= size
            continue
        first, skip = first + skip, 0
        if left is not None and (stop is None or first + left < stop):
            stop = first + left
        if stop is None or stop > first:
            kept.append((first, stop))
        if left is not None and stop is not None:
            left -= stop - first
            if left <= 0:
                break
    return kept
