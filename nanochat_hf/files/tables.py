"""Parquet and Arrow files: rows without the keys that Arrow had to fill in, counts, and whether schemas fit together.

In a column every struct has the keys of all structs: {"city": "Oslo"} beside {"day": 3} is stored as {"city": "Oslo",
"day": None}. Such a None means that the key was not there, so the key is removed again, at any depth. Values stored as
JSON text keep their nulls.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
from pyarrow import ipc, parquet

if TYPE_CHECKING:  # datasets is imported where it is used
    from datasets import Features

Strip = Callable[[Any], Any]


def rows(file: BinaryIO, kind: str, name: str, first: int = 0) -> Iterator[dict]:
    """The rows of an open file from number `first` on, as dicts; ValueError names the file and the damaged rows."""
    from datasets import Features

    schema, batches = _batches(file, kind, name, first)
    features = Features.from_arrow_schema(schema)
    decode = features.decode_example if "Json(" in str(features) else None
    strip = row_strip(features)
    for batch in batches:
        for row in batch.to_pylist():
            row = decode(row) if decode else row
            yield strip(row) if strip else row


def count(file: BinaryIO, kind: str, name: str) -> int:
    """The number of rows of an open file."""
    if kind == "parquet":
        return parquet_file(file, name).metadata.num_rows
    return sum(batch.num_rows for batch in _batches(file, kind, name, 0)[1])


def parquet_file(file: BinaryIO, name: str) -> parquet.ParquetFile:
    """The reader of an open parquet file; ValueError where the file is damaged or of another kind."""
    try:
        return parquet.ParquetFile(file)
    except Exception as error:  # pyarrow raises several kinds
        raise ValueError(f"{name}: no parquet file, {_first_line(error)}; fetch or write it again") from None


def schema_of(file: BinaryIO, kind: str, name: str) -> pa.Schema:
    """The columns of an open file and their types."""
    return parquet_file(file, name).schema_arrow if kind == "parquet" else _batches(file, kind, name, 0)[0]


def common_schema(schemas: Sequence[tuple[str, pa.Schema]]) -> pa.Schema | None:
    """One schema that fits the rows of all files; None where all have the same. `schemas` are (file's name, schema).

    ValueError names the first file and column that do not fit the files before.
    """
    whole = schemas[0][1]
    if all(schema.equals(whole) for _, schema in schemas):
        return None
    for name, schema in schemas[1:]:
        try:
            whole = pa.unify_schemas([whole, schema], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            column = next((f for f in schema if f.name in whole.names and not _unifies(f, whole.field(f.name))), None)
            told = "its columns" if column is None else f"the column {column.name!r}"
            types = "" if column is None else f" is {column.type}, and {whole.field(column.name).type}"
            raise ValueError(
                f"{name}: {told}{types} in {schemas[0][0]}; give files of one kind, or several sources"
            ) from None
    return whole


def _unifies(one: pa.Field, other: pa.Field) -> bool:
    try:
        pa.unify_schemas([pa.schema([one]), pa.schema([other])], promote_options="permissive")
    except pa.ArrowException:
        return False
    return True


def row_strip(features: "Features") -> Strip | None:
    """A function that removes filled-in keys from a row of a table; None where no column can have any.

    `features` are the table's datasets.Features. The columns themselves stay, since every row has all of them.
    """
    strips = {name: strip for name, feature in features.items() if (strip := _strip(feature))}
    if not strips:
        return None

    def row(values: dict) -> dict:
        return values | {name: strip(values[name]) for name, strip in strips.items() if values.get(name) is not None}

    return row


def _strip(feature: Any) -> Strip | None:
    """A function that removes filled-in keys from one value; None where values of that type cannot have any."""
    from datasets import List

    if isinstance(feature, dict):
        inner = {name: _strip(part) for name, part in feature.items()}

        def struct(value: dict) -> dict:
            return {key: strip(v) if (strip := inner.get(key)) else v for key, v in value.items() if v is not None}

        return struct
    items = feature.feature if isinstance(feature, List) or hasattr(feature, "feature") else None
    if isinstance(feature, list):
        items = feature[0]
    inside = _strip(items) if items is not None else None
    if inside is None:
        return None
    strip: Strip = inside

    def listed(value: Any) -> Any:
        if isinstance(value, dict):  # a sequence of structs may be read as a struct of lists
            return strip(value)
        return [None if v is None else strip(v) for v in value]

    return listed


def _batches(file: BinaryIO, kind: str, name: str, first: int) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    if kind == "parquet":
        whole = parquet_file(file, name)
        return whole.schema_arrow, _parquet_batches(whole, name, first)
    try:
        reader: Any = ipc.open_stream(file)
    except pa.ArrowInvalid:
        file.seek(0)
        try:
            whole = ipc.open_file(file)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{name}: no Arrow file, {_first_line(error)}; fetch or write it again") from None
        return whole.schema, _from(first, (whole.get_batch(i) for i in range(whole.num_record_batches)))
    return reader.schema, _from(first, reader)


def _from(first: int, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        if first < batch.num_rows:
            yield batch.slice(first)
        first = max(0, first - batch.num_rows)


def _parquet_batches(file: parquet.ParquetFile, name: str, first: int) -> Iterator[pa.RecordBatch]:
    before = 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if before + size > first:
            try:
                yield from _from(max(0, first - before), file.iter_batches(batch_size=1000, row_groups=[group]))
            except Exception as error:  # as in parquet_file
                told = f"rows {before + 1} to {before + size} are corrupt, {_first_line(error)}"
                raise ValueError(f"{name}: {told}; fetch or write it again") from None
        before += size


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
