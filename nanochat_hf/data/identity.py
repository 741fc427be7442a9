"""What tells one data set from another without reading it, in words: for the state of a stream, which says how much was read."""

import hashlib
from pathlib import Path

from .sources import local_files


def identity(source, rows=None):
    """identity(SourceConfig(path="a/chats.jsonl")) → "chats.jsonl (5,120 bytes)": names and sizes of files, for they may lie elsewhere on
    resuming; a Hub name with its split, and the shards or rows of `rows` (datasets.Dataset or IterableDataset)."""
    files = _files(source)
    if files:
        sizes = [(path.name, path.stat().st_size) for path in files]
        told = f"{sizes[0][0]} ({sizes[0][1]:,} bytes)"
        if len(sizes) > 1:
            digest = hashlib.sha256(repr(sizes).encode()).hexdigest()[:8]
            told = f"{sizes[0][0]} to {sizes[-1][0]} ({len(sizes)} files, {sum(size for _, size in sizes):,} bytes, digest {digest})"
        told = f"{source.task}: {told}" if source.task else told
    else:
        told = f"{source.label}, split {source.split}"
        if hasattr(rows, "num_shards"):
            told += f", {rows.num_shards} shards" if not hasattr(rows, "__len__") else f", {len(rows):,} rows"
    if source.start or source.rows is not None:
        told += f", rows from {source.start}" + (f" to {source.start + source.rows}" if source.rows is not None else "")
    return told + (f", columns {source.columns}" if source.columns else "")


def _files(source):
    if source.path is None:
        return []
    path = Path(source.path)
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return local_files(source)
