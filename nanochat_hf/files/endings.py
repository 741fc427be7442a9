"""The ending of a file's name decides how the file is read: kind_of("a.JSONL.gz") → ("lines", "gzip")."""

from pathlib import PurePosixPath

KINDS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
PACKINGS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
TABLES = ("parquet", "arrow")
READABLE = f"{', '.join(KINDS)}, and the text ones also packed as {', '.join(PACKINGS)}"


def kind_of(name: str) -> tuple[str, str | None] | None:
    """(kind, packing or None) of a file by its last endings, upper or lower case; None where the file cannot be read.

    >>> kind_of("chats.jsonl.parquet"), kind_of("CHATS.JSONL.ZST"), kind_of("notes.txt")
    (('parquet', None), ('lines', 'zstd'), None)
    """
    path = PurePosixPath(name.lower())
    packing = PACKINGS.get(path.suffix)
    if packing is None:
        kind = KINDS.get(path.suffix)
        return None if kind is None else (kind, None)
    inner = PurePosixPath(path.stem).suffix
    kind = KINDS.get(inner, None if inner else "json")  # "rows.gz" is JSON or JSON lines; reading it shows which
    return None if kind is None or kind in TABLES else (kind, packing)
