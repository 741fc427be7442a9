"""Files and ranges of rows → shards, the parts of a stream that processes and workers share out.

The rows are chosen before they are shared out. So rows that `start` leaves for validation are never trained on, for any
number of processes and workers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .data_file import DataFile, Raw
from .splits import Range


@dataclass(frozen=True)
class Shard:
    """Rows `first` to `stop` of a file, counted from 0; with stop None to the file's end."""

    file: DataFile
    first: int = 0
    stop: int | None = None

    def count(self, most: int | None = None) -> int:
        """The number of rows, or `most` where there are more; a text file has to be read for it."""
        size = None if self.stop is None else self.stop - self.first
        wanted = size if most is None or (size is not None and size < most) else most
        return max(0, self.file.count(None if wanted is None else self.first + wanted) - self.first)

    def rows(self, skip: int = 0) -> Iterator[tuple[int, Raw]]:
        """(number within the shard, row) from number `skip` on."""
        size = None if self.stop is None else self.stop - self.first
        if size is not None and skip >= size:
            return
        for number, row in enumerate(self.file.rows(self.first + skip), skip):
            yield number, row
            if size is not None and number + 1 >= size:
                return


def part_of(shards: Sequence[Shard], start: int, rows: int | None) -> list[Shard]:
    """Rows `start` to `start + rows` of all `shards` together; a shard is counted only as far as a bound needs it."""
    kept, skip, left = [], start, rows
    for shard in shards:
        if left is not None and left <= 0:
            break
        if skip == 0 and left is None:
            kept.append(shard)
            continue
        size = shard.count(skip + (left or 0) + 1)
        if skip >= size:
            skip -= size
            continue
        first, stop = shard.first + skip, shard.stop
        if left is not None:
            taken = min(left, size - skip)
            stop, left = first + taken, left - taken
        kept.append(Shard(shard.file, first, stop))
        skip = 0
    return kept


def shards_of(files: Sequence[DataFile], ranges: Sequence[Range]) -> list[Shard]:
    """The parts of `files` that hold the rows in `ranges`, whose numbers run through all files.

    A file is counted only as far as a bound needs it. For two files of 100 rows, shards_of(files, [(10, None)]) gives
    rows 10 to the end of the first, and all of the second.
    """
    bounds = [bound for pair in ranges for bound in pair if bound]
    shards, before = [], 0
    for file in files:
        ahead = [bound - before for bound in bounds if bound > before]
        size = file.count(max(ahead) + 1) if ahead else None
        counted = size is not None and size <= max(ahead)  # otherwise the file goes beyond the last bound
        for first, stop in ranges:
            start, end = max(0, first - before), None if stop is None else stop - before
            if (end is not None and end <= start) or (counted and start >= size):
                continue
            shards.append(Shard(file, start, None if counted and end is not None and end >= size else end))
        before += size or 0
    return shards
