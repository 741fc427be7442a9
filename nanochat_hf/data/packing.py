"""Stop 4: which documents share a row. Pure; no torch."""

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Plan(Sequence):
    """Rows of document numbers in two arrays: row r is order[starts[r] : starts[r + 1]]. Ten bytes a document."""

    order: np.ndarray  # int32 (documents,)
    starts: np.ndarray  # int64 (rows + 1,)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: Any) -> list[int]:
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        return self.order[self.starts[row] : self.starts[row + 1]].tolist()


def plan_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best fit, longest first, as `plan` has it. No index is lost. ValueError for a length over the capacity.

    >>> plan_rows([5, 3, 2], capacity=5)
    [[0], [1, 2]]
    """
    return list(plan(np.asarray(lengths, dtype=np.int64), capacity))


def plan(lengths: np.ndarray, capacity: int) -> Plan:
    """Best fit, longest first: each length (int, (n,)) goes to the fullest row that has room for it, else to a new one.

    Documents of one length are placed together. The fullest row that fits has some space s, and it stays the fullest
    until it has taken s // length of them. So one array operation fills a group of rows of equal space. The cost is a
    sort and at most O(capacity²) such operations, whatever the number of documents. ValueError names the first length
    that fits no row.
    """
    wrong = np.flatnonzero((lengths <= 0) | (lengths > capacity))
    if len(wrong):
        first = wrong[0]
        raise ValueError(
            f"lengths[{first}]={lengths[first]} must be between 1 and the row's capacity {capacity}; cut or drop it "
            "first"
        )
    # numpy sorts 16-bit integers by radix, which is three times as fast
    keys = (capacity - lengths).astype(np.uint16 if capacity < 1 << 16 else np.int64)
    longest = np.argsort(keys, kind="stable").astype(np.int32 if len(lengths) < 1 << 31 else np.int64)
    row_of = np.empty(len(lengths), dtype=longest.dtype)  # of the documents in that order
    counts = np.bincount(lengths, minlength=1)
    rooms = _Rooms(capacity)
    place = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        stop = place + int(counts[length])
        while place < stop:
            place += rooms.fill(length, row_of[place:stop])
    by_row = np.argsort(row_of, kind="stable")
    starts = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=rooms.rows))))
    return Plan(longest[by_row], starts.astype(np.int64))


class _Rooms:
    """Rows by the space that is left in them: stacks of arrays, the row that was filled last on top."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.rows = capacity, 0
        self.free: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
        self.existing = 0  # bit s is set where some row has space s

    def fill(self, length: int, row_of: np.ndarray) -> int:
        """Place documents of `length` into rows that have one same space, or into new rows.

        Writes the number of each document's row into `row_of`; returns how many documents were placed.
        """
        fitting = self.existing >> length
        space = length + (fitting & -fitting).bit_length() - 1 if fitting else self.capacity
        each = space // length  # documents that one row takes
        wanted = -(-len(row_of) // each)
        if fitting:
            chunk = self.free[space].pop()
            taken, rest = chunk[-wanted:][::-1], chunk[:-wanted]
            if len(rest):
                self.free[space].append(rest)
            if not self.free[space]:
                self.existing &= ~(1 << space)
        else:
            taken = np.arange(self.rows, self.rows + wanted, dtype=row_of.dtype)
            self.rows += wanted
        placed = min(len(row_of), len(taken) * each)
        full, more = divmod(placed, each)
        row_of[: full * each] = np.repeat(taken[:full], each)
        row_of[full * each : placed] = taken[full] if more else 0
        self._leave(space - each * length, taken[:full])
        if more:
            self._leave(space - more * length, taken[full:])
        return placed

    def _leave(self, space: int, rows: np.ndarray) -> None:
        if space and len(rows):
            self.free[space].append(rows)
            self.existing |= 1 << space


def pack_text(documents: Sequence[Any], capacity: int, mode: str, bos: int) -> tuple[list[list[Any]], list[Any]]:
    """Full rows from a window of documents: best fit; where nothing fits, the shortest document is cut to fill the row.

    `mode` "crop" drops the rest of a cut document, as nanochat does; "keep" puts it back with a `bos` before it and
    loses no token. Rows are made until the documents that are left would not fill one. Returns (rows, documents left).
    Documents may be any sequences with a length and slices. Finding a document for a place takes O(log n) of n
    documents.

    >>> pack_text([[0, 1, 2], [0, 3, 4, 5]], 5, "keep", 0)
    ([[[0, 3, 4, 5], [0]]], [[0, 1, 2]])
    """
    queue = sorted((len(d), serial) for serial, d in enumerate(documents))
    held, total, rows = dict(enumerate(documents)), sum(map(len, documents)), []
    serial = len(held)
    while total >= capacity:
        row: list[Any] = []
        space = capacity
        while space:
            place = bisect_right(queue, (space, serial)) - 1
            length, taken = queue.pop(max(place, 0))
            document = held.pop(taken)
            total -= length
            if length > space:
                if mode == "keep":
                    rest = [bos, *document[space:]]
                    held[serial] = rest
                    insort(queue, (len(rest), serial))
                    total, serial = total + len(rest), serial + 1
                document = document[:space]
            row.append(document)
            space -= len(document)
        rows.append(row)
    return rows, [held[s] for _, s in sorted(queue, key=lambda entry: entry[1])]


def pack_window(
    lengths: Sequence[int], capacity: int, aged: set[int], full: float = 0.98
) -> tuple[list[list[int]], list[int]]:
    """Rows of a window of a stream, each index once → (rows, indices that wait for the next window).

    A row filled less than `full` waits, so that the next window's documents can complete it; but at most a quarter of
    the rows, and none that holds an index in `aged`, which waited before.

    >>> pack_window([5, 4, 1, 2], 5, set())
    ([[0], [1, 2]], [3])
    """
    rows = plan_rows(lengths, capacity)
    fill = [sum(lengths[i] for i in row) / capacity for row in rows]
    poor = [r for r in range(len(rows)) if fill[r] < full and not any(i in aged for i in rows[r])]
    waiting = set(sorted(poor, key=lambda r: (fill[r], r))[: max(1, len(rows) // 4)])
    return [row for r, row in enumerate(rows) if r not in waiting], [i for r in sorted(waiting) for i in rows[r]]
