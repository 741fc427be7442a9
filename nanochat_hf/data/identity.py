"""What tells one data set from another without reading it, in words.

For the state of a stream, which says how much was read.
"""

import hashlib
import os
from pathlib import Path

from nanochat_hf.files.listing import is_local, list_local

from .readers import MapReader, Reader, StreamReader
from .sources import SourceConfig


def identity(source: SourceConfig, reader: Reader | None = None) -> str:
    """Names and sizes of files, for they may lie elsewhere on resuming: "chats.jsonl (5,120 bytes)".

    Of a Hub name its split, and the shards or rows that `reader` has.
    """
    files = _files(source)
    if files:
        sizes = [(path.name, path.stat().st_size) for path in files]
        told = f"{sizes[0][0]} ({sizes[0][1]:,} bytes)"
        if len(sizes) > 1:
            digest = hashlib.sha256(repr(sizes).encode()).hexdigest()[:8]
            total = sum(size for _, size in sizes)
            told = f"{sizes[0][0]} to {sizes[-1][0]} ({len(sizes)} files, {total:,} bytes, digest {digest})"
        told = f"{source.task}: {told}" if source.task else told
        told += f", split {source.split}" if source.split != "train" else ""
    else:
        told = f"{source.label}, split {source.split}"
        if isinstance(reader, StreamReader):
            told += f", {len(reader.sharded)} shards"
        elif isinstance(reader, MapReader):
            told += f", {len(reader.rows):,} rows"
    if source.start or source.rows is not None:
        told += f", rows from {source.start}" + (f" to {source.start + source.rows}" if source.rows is not None else "")
    return told + (f", columns {source.columns}" if source.columns else "")


def _files(source: SourceConfig) -> list[Path]:
    """The local files of a source, a folder's with those that say how to read it.

    [] for a Hub name and what code makes.
    """
    if source.path is None:
        return []
    if os.path.isdir(source.path):
        return sorted(p for p in Path(source.path).rglob("*") if p.is_file() and not p.name.startswith("."))
    if os.path.isfile(source.path):
        return [Path(source.path)]
    return [Path(file.path) for file in list_local(source.path).files] if is_local(source.path) else []
