"""Plain text: which rows a source has, and the texts in them."""

from pathlib import Path

from .sources import load_source, load_stream, local_files, parse_line


def is_remote(source):
    """Whether the path is a Hub name: neither a folder here nor files. is_remote(SourceConfig(path="karpathy/x")) → True."""
    return not Path(source.path).exists() and not local_files(source)


def load_rows(source, streaming, text_column="text"):
    """load_source or, `streaming`, load_stream with lines of JSON made into {text_column: …} rows."""
    if not streaming:
        return load_source(source)
    rows = load_stream(source)
    files = local_files(source)
    return rows.map(JsonText(source.label, text_column)) if files and ".jsonl" in files[0].suffixes else rows


class JsonText:
    """Makes {column: …} of a streamed line of JSON."""

    def __init__(self, label, column):
        self.label, self.column = label, column

    def __call__(self, row):
        value = parse_line(row["text"], f"{self.label}: the line {row['text'][:60]!r}")
        if not isinstance(value, dict) or self.column not in value:
            has = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{self.label}: no column {self.column!r}; it has {has}")
        return {self.column: value[self.column]}


def documents(rows, column, document_chars=None, max_chars=None):
    """The texts of `rows`, each cut to `document_chars`, `max_chars` characters in all.

    list(documents([{"t": "abcd"}, {"t": "ef"}, {"t": "g"}], "t", 3, 4)) → ["abc", "e"]. ValueError for a row whose column holds no text.
    """
    left = float("inf") if max_chars is None else max_chars
    for number, row in enumerate(rows, 1):
        text = row.get(column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise ValueError(f"document {number}: {column!r} holds {type(text).__name__}, not text; remove it or give text")
        text = text[:document_chars]
        text = text if len(text) <= left else text[: int(left)]
        left -= len(text)
        yield text
        if left <= 0:
            return
