"""Plain text: which rows a source has, and the texts in them."""

from pathlib import Path

from .sources import JsonLines, load_source, load_stream, local_files, parse_line


def is_remote(source):
    """Whether the path is a Hub name: neither a folder here nor files. is_remote(SourceConfig(path="karpathy/x")) → True."""
    return not Path(source.path).exists() and not local_files(source)


def load_rows(source, streaming, text_column="text"):
    """load_source or, `streaming`, load_stream with lines of JSON made into {text_column: …} rows."""
    if not streaming:
        return load_source(source)
    rows = load_stream(source)
    files = local_files(source)
    return (
        rows.map(JsonText(text_column), remove_columns=["line", "where"])
        if files and ".jsonl" in files[0].suffixes
        else rows
    )


class JsonText:
    """Makes {column: …} of a streamed line of JSON."""

    def __init__(self, column):
        self.column = column

    def __call__(self, row):
        value = parse_line(row["line"], row["where"])
        if not isinstance(value, dict) or self.column not in value:
            has = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{row['where']}: no column {self.column!r}; it has {has}")
        if not isinstance(value[self.column], str):
            kind = type(value[self.column]).__name__
            raise ValueError(f"{row['where']}: {self.column!r} holds {kind}; remove the line or give it text")
        return {self.column: value[self.column]}


def check_column(rows, column, label):
    """ValueError, with the columns there are, where a row lacks `column` or holds no text in it. Of a stream the first row is looked at, of a
    datasets.Dataset the type of the column and its nulls, of lines of JSON every one."""
    lines = isinstance(rows, JsonLines)
    for number in range(len(rows)) if lines else (0,):
        row, where = (
            (rows[number], rows.where(number))
            if lines
            else (rows[0] if hasattr(rows, "__len__") else next(iter(rows), None), label)
        )
        if row is None:
            raise ValueError(f"{label}: no rows there; check the data, and the rows that are left out at its start")
        names = list(row) if isinstance(row, dict) else [f"no columns but {type(row).__name__}"]
        if column not in names:
            raise ValueError(f"{where}: no column {column!r}; it has {', '.join(map(str, names))}")
        if not isinstance(row[column], str):
            raise ValueError(
                f"{where}: column {column!r} holds {type(row[column]).__name__}, not text; name another of {', '.join(names)}"
            )
    empty = rows.data.column(column).null_count if hasattr(rows, "data") else 0
    if empty:
        raise ValueError(f"{label}: {empty} rows hold nothing in {column!r}; remove them or give them text")


def documents(rows, column, document_chars=None, max_chars=None):
    """The texts of `rows`, each cut to `document_chars`, `max_chars` characters in all.

    list(documents([{"t": "abcd"}, {"t": "ef"}, {"t": "g"}], "t", 3, 4)) → ["abc", "e"]. ValueError for a row whose column holds no text.
    """
    left = float("inf") if max_chars is None else max_chars
    for number, row in enumerate(rows, 1):
        text = row.get(column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise ValueError(
                f"document {number}: {column!r} holds {type(text).__name__}, not text; remove it or give text"
            )
        text = text[:document_chars]
        text = text if len(text) <= left else text[: int(left)]
        left -= len(text)
        yield text
        if left <= 0:
            return
