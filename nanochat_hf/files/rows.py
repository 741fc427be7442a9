"""The rows of data files as one sequence, each with its place: lines of JSON in memory, or a table on disk."""

import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import tables
from .data_file import DataFile, Place, Raw
from .splits import Range

if TYPE_CHECKING:  # datasets is imported where it is used
    from datasets import Dataset


class Rows(Sequence):
    """Rows of a data set: rows[i] is the value, rows.raw(i) the row as it is in its file, with its place."""

    @abstractmethod
    def raw(self, index: int) -> Raw:
        """The row as it is in its file."""

    @abstractmethod
    def select(self, ranges: Sequence[Range]) -> "Rows":
        """Only the rows in `ranges`; they keep their places."""

    def where(self, index: int) -> str:
        """The row's place, for messages."""
        return str(self.raw(index).place)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            raise TypeError("rows are taken one by one, or by select")
        return self.raw(index).parsed()

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


class LineRows(Rows):
    """Rows of text files: `lines` of JSON, parsed when a row is taken, and `places`, the fields of Place as tuples."""

    def __init__(self, lines: list[bytes], places: list[tuple]) -> None:
        self.lines, self.places = lines, places

    def __len__(self) -> int:
        return len(self.lines)

    def raw(self, index: int) -> Raw:
        """The line without parsing it."""
        return Raw(self.lines[index], Place(*self.places[index]))

    def select(self, ranges: Sequence[Range]) -> "LineRows":
        """As Rows.select."""
        lines = [line for first, stop in ranges for line in self.lines[first:stop]]
        return LineRows(lines, [place for first, stop in ranges for place in self.places[first:stop]])


class ListRows(Rows):
    """Rows that code made; `start` is the number of the first of them among all rows that the code makes."""

    def __init__(self, rows: list, label: str, start: int = 0) -> None:
        self.rows, self.label, self.start = rows, label, start

    def __len__(self) -> int:
        return len(self.rows)

    def raw(self, index: int) -> Raw:
        """The row; its place has its number among all rows that the code makes."""
        return Raw(self.rows[index], Place(self.label, "row", self.start + index + 1))

    def select(self, ranges: Sequence[Range]) -> "ListRows":
        """As Rows.select."""
        rows = [row for first, stop in ranges for row in self.rows[first:stop]]
        return ListRows(rows, self.label, self.start + (ranges[0][0] if ranges else 0))


@dataclass(frozen=True)
class TablePlaces:
    """The places of a table's rows: `sizes` are (file, rows) in order, `ranges` the rows selected from all of them."""

    label: str
    sizes: tuple[tuple[str, int], ...]
    ranges: tuple[tuple[int, int], ...]

    def __call__(self, index: int) -> Place:
        """The place of row `index` of the selected rows."""
        for first, stop in self.ranges:
            if index < stop - first:
                index += first
                break
            index -= stop - first
        for name, size in self.sizes:
            if index < size:
                return Place(name, "row", index + 1)
            index -= size
        return Place(self.label, "row", index + 1)


class TableRows(Rows):
    """Rows of a datasets.Dataset.

    `sizes` are (file, rows) in order; where the files are not known, `label` names all rows.
    """

    def __init__(self, dataset: "Dataset", label: str, sizes: Sequence[tuple[str, int]] = ()) -> None:
        self.dataset, self.label = dataset, label
        whole = (0, len(dataset))
        self.places = TablePlaces(label, tuple(sizes) or ((label, len(dataset)),), (whole,))
        self.strip = tables.row_strip(dataset.features)

    def __len__(self) -> int:
        return len(self.dataset)

    def raw(self, index: int) -> Raw:
        """The row, without the keys that Arrow had to fill in."""
        row = self.dataset[index]
        return Raw(self.strip(row) if self.strip else row, self.places(index))

    def select(self, ranges: Sequence[Range]) -> "TableRows":
        """As Rows.select; once only."""
        kept = [(first, len(self) if stop is None else min(stop, len(self))) for first, stop in ranges]
        if kept == [(0, len(self))]:
            return self
        if self.places.ranges != ((0, len(self)),):
            raise ValueError("the rows of a table are selected once")
        numbers = range(*kept[0]) if len(kept) == 1 else [i for pair in kept for i in range(*pair)]
        selected = TableRows(self.dataset.select(numbers), self.label)
        selected.places = replace(self.places, ranges=tuple(kept))
        return selected


def load_files(files: Sequence[DataFile], label: str) -> Rows:
    """The rows of all `files`, which must be local, in order.

    Tables of one kind stay on disk; other files are read into memory as lines. ValueError names the file that cannot be
    read, or the column that differs between tables.
    """
    if len({file.kind for file in files}) == 1 and files[0].is_table:
        return _table(files, label)
    lines: list[bytes] = []
    places: list[tuple] = []
    for file in files:
        for value, place in file.rows():
            lines.append(value if isinstance(value, bytes) else json.dumps(value, default=str).encode())
            places.append(tuple(place))
    return LineRows(lines, places)


def joined(parts: Sequence[Rows], label: str) -> Rows:
    """The rows of several parts, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    as_tables = [part for part in parts if isinstance(part, TableRows)]
    if len(as_tables) == len(parts):
        from datasets import concatenate_datasets

        sizes = [(table.label, len(table)) for table in as_tables]
        return TableRows(concatenate_datasets([table.dataset for table in as_tables]), label, sizes)
    lines, places = [], []
    for part in parts:
        raws = [part.raw(i) for i in range(len(part))]
        lines += [r.value if isinstance(r.value, bytes) else json.dumps(r.value, default=str).encode() for r in raws]
        places += [tuple(raw.place) for raw in raws]
    return LineRows(lines, places)


def _table(files: Sequence[DataFile], label: str) -> TableRows:
    from datasets import Features, load_dataset

    schemas, sizes = [], []
    for file in files:
        with file.open() as opened:
            schemas.append((file.name, tables.schema_of(opened, file.kind, file.name)))
        sizes.append((file.name, file.count()))
    schema = tables.common_schema(schemas)
    features = None if schema is None else Features.from_arrow_schema(schema)
    if sum(size for _, size in sizes) == 0:
        raise ValueError(f"{label}: no rows; give a file that holds some")
    paths = [file.path for file in files]
    try:
        dataset = load_dataset(files[0].kind, data_files=paths, split="train", features=features)
    except Exception as error:
        if fault := next(filter(None, map(damage, files)), None):
            raise ValueError(fault) from error
        raise
    return TableRows(dataset, label, sizes)


def damage(file: DataFile) -> str | None:
    """The fault of a table in words, None for a sound one; all of it is read."""
    try:
        for _ in file.rows():
            pass
    except ValueError as error:
        return str(error)
    return None
