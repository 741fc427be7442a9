"""One data file, here or on the Hub: its rows with their places, and how many there are."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from . import tables
from .endings import TABLES
from .text import numbered_lines, parse_line, unit, unpacked

HUB = "hf://"


class Place(NamedTuple):
    """Where a row comes from. Text is only made when it is needed: str(Place("a", "line", 3)) → "a line 3"."""

    name: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.name} {self.unit} {self.number}"


class Raw(NamedTuple):
    """A row as it is in its file, a line of JSON (bytes) or a value such as a dict, and its place."""

    value: Any
    place: Place | str

    def parsed(self) -> Any:
        """The row's value; ValueError with the place where the line is no JSON."""
        return parse_line(self.value, str(self.place)) if isinstance(self.value, bytes) else self.value


@dataclass(frozen=True)
class DataFile:
    """A file that can be read: `path` (or hf://datasets/…), its `kind` and `packing` of `endings`."""

    path: str
    kind: str
    packing: str | None = None

    @property
    def is_table(self) -> bool:
        """Whether the rows lie in columns: parquet and Arrow."""
        return self.kind in TABLES

    @property
    def is_remote(self) -> bool:
        """Whether the file lies on the Hub."""
        return self.path.startswith(HUB)

    @property
    def name(self) -> str:
        """The file's name in messages: its path, or its name on the Hub."""
        return self.path.removeprefix(f"{HUB}datasets/")

    @property
    def basename(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name

    def open(self) -> BinaryIO:
        """The file opened for its bytes, still packed; ValueError where it is missing or cannot be read."""
        try:
            if self.is_remote:
                from huggingface_hub import HfFileSystem

                return HfFileSystem().open(self.path, "rb")
            return open(self.path, "rb")
        except FileNotFoundError:
            raise ValueError(f"{self.name}: no such file; give an existing data file") from None
        except OSError as error:
            raise ValueError(f"{self.name}: cannot be read ({error.strerror or error}); give a file") from None

    def rows(self, first: int = 0) -> Iterator[Raw]:
        """The rows from number `first` (from 0) on. ValueError names the file, and the damaged rows of a table."""
        if self.is_table:
            with self.open() as file:
                for number, row in enumerate(tables.rows(file, self.kind, self.name, first), first + 1):
                    yield Raw(row, Place(self.name, unit(self.kind), number))
            return
        for line, number in islice(self._lines(), first, None):
            yield Raw(line, Place(self.name, unit(self.kind), number))

    def count(self, most: int | None = None) -> int:
        """The number of rows, or `most` where there are more; a text file has to be read for it."""
        if self.is_table:
            with self.open() as file:
                rows = tables.count(file, self.kind, self.name)
            return rows if most is None else min(rows, most)
        return sum(1 for _ in islice(self._lines(), most))

    def _lines(self) -> Iterator[tuple[bytes, int]]:
        with self.open() as packed:
            try:
                yield from numbered_lines(unpacked(packed, self.packing), self.kind)
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.name}: not UTF-8 ({error.reason}); save it as UTF-8") from None
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from None
            except Exception as error:  # each packing has its own error for a file that breaks off
                if isinstance(error, MemoryError):
                    raise
                raise ValueError(f"{self.name}: cannot be read ({error}); fetch or write it again") from None
