"""Text files → rows as lines of JSON (bytes), of whatever shape: JSON lines, JSON, CSV and TSV.

The cells of a CSV stay text, whatever they look like. A faulty row becomes a line that begins with FAULT, which
`parse_line` turns into the error. So a reader that leaves bad rows out can leave out this one too.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Iterator
from typing import Any, BinaryIO

Numbered = tuple[bytes, int]  # a line of JSON, and the number by which messages name it
FAULT = b"\0"  # begins a line that describes the fault of a row instead of holding JSON


def parse_line(line: bytes, where: str) -> Any:
    """One line of JSON → its value; ValueError begins with `where`."""
    if line.startswith(FAULT):
        raise ValueError(f"{where}: {line[1:].decode()}")
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError(f"{where}: not JSON (nested too deeply); correct or remove it") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, and numbers of thousands of digits
        raise ValueError(f"{where}: not JSON ({getattr(error, 'msg', error.args[-1])}); correct or remove it") from None


def unpacked(file: BinaryIO, packing: str | None) -> BinaryIO:
    """The bytes of an open file, unpacked while they are read."""
    if packing == "zstd":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(file, "zstd"), 1 << 16)
    openers: dict[str, Any] = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    return openers[packing](file, "rb") if packing else file


def numbered_lines(file: BinaryIO, kind: str) -> Iterator[Numbered]:
    """The rows of an open text file, each with the number of its line, or in a JSON list the number of its element."""
    if kind == "lines":
        return _lines(file)
    if kind in ("csv", "tsv"):
        return _cells(file, "," if kind == "csv" else "\t")
    return _json(file)


def unit(kind: str) -> str:
    """What the numbers of rows count in a kind of file: lines or rows."""
    return "row" if kind in ("json", "parquet", "arrow") else "line"


def _lines(file: BinaryIO) -> Iterator[Numbered]:
    for number, line in enumerate(file, 1):
        if line.strip() and line != b"\xef\xbb\xbf\n":
            yield line, number


def _json(file: BinaryIO) -> Iterator[Numbered]:
    """The elements of a JSON list, or the lines of JSON lines; any other JSON is one row.

    A list of the messages of one conversation is one row too.
    """
    content = file.read()
    if not content.strip():
        return
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("not JSON, nested too deeply") from None
    except ValueError as error:
        if "Extra data" not in str(error):
            raise ValueError(f"not JSON, {error}") from None
        yield from _lines(io.BytesIO(content))
        return
    is_conversation = isinstance(value, list) and value and all(isinstance(v, dict) and "role" in v for v in value)
    rows = value if isinstance(value, list) and not is_conversation else [value]
    for number, row in enumerate(rows, 1):
        yield json.dumps(row).encode(), number


def _cells(file: BinaryIO, delimiter: str) -> Iterator[Numbered]:
    csv.field_size_limit(1 << 30)  # csv refuses more than 128 KiB, but documents are longer
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        yield from _cell_rows(csv.reader(text, delimiter=delimiter))
    finally:
        text.detach()  # the caller opened the file, so the caller closes it


def _cell_rows(reader: Any) -> Iterator[Numbered]:
    names: list[str] | None = None
    before = 0
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}, {error}") from None
        number, before = before + 1, reader.line_num
        if cells is None:
            return
        if not cells:
            continue
        if names is None:
            names = cells
            if doubled := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"line {number}, the column {doubled!r} is there twice")
        elif len(cells) != len(names):
            fault = f"{len(cells)} cells under {len(names)} columns; quote what holds a delimiter, or remove the line"
            yield FAULT + fault.encode(), number
        else:
            yield json.dumps(dict(zip(names, cells, strict=True))).encode(), number
