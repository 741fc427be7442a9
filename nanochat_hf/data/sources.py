"""Data sources: a Hub name, local files or a task → rows. What cannot be read is said in one line that names file and row."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyarrow import parquet

from nanochat_hf.config import guessed
from nanochat_hf.tasks import get_task

from .formats import FORMATS

BUILDERS = {".json": "json", ".jsonl": "json", ".gz": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


@dataclass(frozen=True)
class SourceConfig:
    """One data set of a mixture: a Hub name, local file(s) or a folder in `path`, or a `task`.

    Rows `start` to `start + rows`, `repeat` times; or `weight` times: 0.5 takes a seeded half, 1.5 all and a half once more.
    `columns` renames: {prompt: question, completion: answer}. `converter` fixes the form of the rows, one of formats.FORMATS.
    """

    path: str | None = None
    name: str | None = None
    split: str = "train"
    task: str | None = None
    repeat: int = 1
    rows: int | None = None
    start: int = 0
    weight: float | None = None
    columns: dict | None = None
    converter: str | None = None

    def __post_init__(self):
        if self.path is None and self.task is None:
            raise ValueError("a data source needs path or task; give one of them")
        if not isinstance(self.repeat, int) or self.repeat < 1:
            raise ValueError(
                f"{self.label}: repeat={self.repeat} must be a whole number from 1; leave the source out instead"
            )
        if self.weight is not None and not self.weight > 0:
            raise ValueError(f"{self.label}: weight={self.weight} must be above 0; leave the source out instead")
        if self.weight is not None and self.repeat != 1:
            raise ValueError(
                f"{self.label}: repeat={self.repeat} and weight={self.weight} say the same thing twice; give one"
            )
        if self.start < 0 or (self.rows is not None and self.rows < 1):
            raise ValueError(
                f"{self.label}: start={self.start}, rows={self.rows} is no range; give start from 0 and rows from 1"
            )
        if self.converter is not None and self.converter not in FORMATS:
            raise ValueError(f"{self.label}: converter={self.converter!r} is unknown; choose from {', '.join(FORMATS)}")
        if self.columns is not None and not isinstance(self.columns, dict):
            raise ValueError(f"{self.label}: columns={self.columns!r} must map new names to those of the data")

    @property
    def label(self):
        """What messages call this source."""
        return ":".join(filter(None, (self.task, self.path, self.name)))

    @property
    def copies(self):
        """How often a row is taken, on average."""
        return self.weight if self.weight is not None else self.repeat

    @classmethod
    def from_recipe(cls, entry):
        """A mapping of a recipe → SourceConfig; ValueError names an unknown key."""
        if not isinstance(entry, dict):
            raise ValueError(f"data source: {entry!r} must be a mapping such as {{path: chats.jsonl, repeat: 2}}")
        unknown = set(entry) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"data source: unknown keys {guessed(sorted(unknown), cls.__dataclass_fields__)}; known are {', '.join(cls.__dataclass_fields__)}"
            )
        return cls(**entry)


class JsonLines(Sequence):
    """The rows of .jsonl(.gz) files, of whatever shape, held as bytes and parsed when asked for; blank lines are passed over.

    JsonLines([Path("chats.jsonl")])[0] → the first line's value. ValueError names file and line of what is no JSON.
    """

    def __init__(self, files, check=False):
        self.lines, self.places = [], []
        for path in files:
            for number, line in enumerate(_lines(path), 1):
                if line.strip():
                    self.lines.append(line)
                    self.places.append((path, number))
        if check:
            for i in range(len(self)):
                self[i]

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, index):
        if isinstance(index, slice):
            part = JsonLines(())
            part.lines, part.places = self.lines[index], self.places[index]
            return part
        return parse_line(self.lines[index], self.where(index))

    def where(self, index):
        """File and line of a row, for messages."""
        path, number = self.places[index]
        return f"{path} line {number}"


def parse_line(line, where):
    """One line of JSON → its value; ValueError begins with `where`."""
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not JSON ({getattr(error, 'msg', error.args[-1])}); correct or remove it") from None


def _lines(path):
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            yield from file
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give an existing data file") from None
    except (EOFError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); fetch or write it again") from None


def local_files(source):
    """The files that a path or pattern with a known ending names, sorted; [] for a Hub name or a folder."""
    path = Path(source.path)
    if path.suffix not in BUILDERS or path.is_dir():
        return []
    files = sorted(path.parent.glob(path.name)) if any(c in path.name for c in "*?[") else [path]
    if not files or not all(f.is_file() for f in files):
        raise ValueError(f"{source.path}: no such file; give an existing data file")
    return files


def load_source(source, check=True):
    """The rows of a path as a sequence of dicts or lists: JsonLines for .jsonl(.gz), else a datasets.Dataset. ValueError where it
    cannot be read or is empty; `check` parses every line of JSON now, so that no bad one shows up in the middle of training."""
    files = local_files(source)
    lines = bool(files) and ".jsonl" in files[0].suffixes
    rows = JsonLines(files, check) if lines else _dataset(source, files)
    stop = len(rows) if source.rows is None else min(source.start + source.rows, len(rows))
    if source.start >= stop:
        raise ValueError(
            f"{source.label}: no rows from {source.start} on in split {source.split!r}, which has {len(rows)}; check start and rows"
        )
    if (source.start, stop) != (0, len(rows)):
        rows = rows[source.start : stop] if lines else rows.select(range(source.start, stop))
    return rows if lines else _rename(rows, source)


def load_stream(source):
    """A datasets.IterableDataset of the source; a .jsonl file gives {"line", "where"}, as lines may be lists. ValueError as load_source:
    what can be known without reading all of it is said here, the rest where it is read, with file and row too."""
    from datasets import IterableDataset, load_dataset

    files = local_files(source)
    lines = bool(files) and ".jsonl" in files[0].suffixes
    try:
        if lines:
            rows = IterableDataset.from_generator(_numbered_lines, gen_kwargs={"files": files})
        elif files:
            for path in files:
                if path.suffix == ".parquet":
                    parquet.read_metadata(path)  # the end of the file: a cut one shows before training
            rows = load_dataset(
                BUILDERS[files[0].suffix], data_files=[str(f) for f in files], split="train", streaming=True
            )
        else:
            rows = load_dataset(source.path, source.name, split=source.split, streaming=True)
        first = next(iter(rows), None)
    except Exception as error:  # datasets raises its own kinds for each fault; the user needs the reason in one line
        raise unreadable(source, error) from error
    if first is None:
        raise ValueError(f"{source.label}: no rows in split {source.split!r}; give another split or file")
    if source.start or source.rows is not None:
        rows = rows.skip(source.start)
        rows = rows if source.rows is None else rows.take(source.rows)
    return rows if lines else _rename(rows, source)


def task_rows(source):
    """The rows of a task's split: a list or a datasets.Dataset. ValueError where there are none or the split is missing."""
    task, stop = get_task(source.task), None if source.rows is None else source.start + source.rows
    try:
        rows = task.load(source.split, path=source.path, limit=stop)
    except ValueError:
        raise
    except Exception as error:  # as in _dataset
        raise ValueError(
            f"{source.label}: cannot be loaded ({_reason(error, [])}); check split {source.split!r} and the path"
        ) from error
    if len(rows) <= source.start:
        raise ValueError(
            f"{source.label}: no rows from {source.start} on in split {source.split!r}, which has {len(rows)}; check start and rows"
        )
    if source.start:
        rows = rows[source.start :] if isinstance(rows, list) else rows.select(range(source.start, len(rows)))
    return rows


def _numbered_lines(files):
    for path in files:
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                yield {"line": line, "where": f"{path} line {number}"}


def unreadable(source, error):
    """The ValueError that says why a source cannot be read (on), with the file and the rows at fault where they can be found."""
    return ValueError(
        f"{source.label}: cannot be loaded ({_reason(error, [] if source.task else local_files(source))}); check the name and the files"
    )


def locate(source, row):
    """Where a streamed row stands, for messages: "FILE line N" of a .jsonl, "FILE row N" of local parquet files, which are read again; else the
    source and how the row begins."""
    if isinstance(row, dict) and set(row) == {"line", "where"}:
        return row["where"]
    row = {source.columns.get(k, k): v for k, v in row.items()} if source.columns and isinstance(row, dict) else row
    for path in [] if source.task else local_files(source):
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches() if path.suffix == ".parquet" else ():
            for other in batch.to_pylist():
                number += 1
                if other == row:
                    return f"{path} row {number}"
    return f"{source.label}: the row {str(row)[:60]!r}"


def _dataset(source, files):
    from datasets import DatasetDict, load_dataset, load_from_disk

    try:
        if files:
            return load_dataset(BUILDERS[files[0].suffix], data_files=[str(f) for f in files], split="train")
        folder = Path(source.path)
        if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            saved = load_from_disk(source.path)
            if isinstance(saved, DatasetDict) and source.split not in saved:
                raise ValueError(f"no split {source.split!r}, it has {', '.join(saved)}")
            return saved[source.split] if isinstance(saved, DatasetDict) else saved
        return load_dataset(source.path, source.name, split=source.split)
    except Exception as error:  # as above
        raise unreadable(source, error) from error


def _reason(error, files):
    """The first line of an error's deepest cause, behind the file and the rows at fault where they can be found."""
    for path in files:
        if path.suffix == ".parquet" and (fault := _corrupt_parquet(path)):
            return fault
        if path.suffix == ".json":
            try:
                json.loads(path.read_bytes())
            except ValueError as fault:
                if "Extra data" not in str(fault) or (fault := next(_bad_lines(path), None)):
                    return f"{path}: not JSON, {fault}"
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _bad_lines(path):
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                json.loads(line)
            except ValueError as fault:
                yield f"line {number}, {fault}"


def _corrupt_parquet(path):
    """The first group of rows that cannot be read, in words; None for a sound file."""
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow raises several kinds
        return f"{path}: no parquet file, {str(error).splitlines()[0]}"
    first = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        try:
            file.read_row_group(group)
        except Exception as error:  # as above
            return f"{path}: rows {first + 1} to {first + rows} are corrupt, {str(error).splitlines()[0]}"
        first += rows
    return None


def _rename(rows, source):
    if not source.columns:
        return rows
    names = rows.column_names or []
    missing = [c for c in source.columns.values() if c not in names]
    if missing:
        raise ValueError(f"{source.label}: no column {missing[0]!r}; it has {', '.join(names)}")
    return rows.rename_columns({old: new for new, old in source.columns.items() if old != new})
