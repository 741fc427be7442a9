"""A text that tells one data set from another without reading it.

The state of a stream holds it, so that a resumed run notices other data.
"""

import hashlib
import os
from pathlib import Path

from nanochat_hf.files.listing import is_local, list_local

from .readers import MapReader, Reader, StreamReader
from .sources import SourceConfig


def identity(source: SourceConfig, reader: Reader | None = None) -> str:
    """The identity of a source in words: for files "chats.jsonl (5,120 bytes)".

    Folders do not count, since files may be moved before a run resumes. For a Hub name the text has the split, and the
    number of shards or rows that `reader` has.
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
    told += f", files {source.files}" if source.files else ""
    if source.start or source.rows is not None:
        told += f", rows from {source.start}" + (f" to {source.start + source.rows}" if source.rows is not None else "")
    return told + (f", columns {source.columns}" if source.columns else "")


def _files(source: SourceConfig) -> list[Path]:
    """The local files of a source; of a folder all of them, also those that describe the data.

    [] for a Hub name and for a task that makes its rows.
    """
    if source.path is None:
        return []
    if os.path.isdir(source.path):
        return sorted(p for p in Path(source.path).rglob("*") if p.is_file() and not p.name.startswith("."))
    if os.path.isfile(source.path):
        return [Path(source.path)]
    return [Path(file.path) for file in list_local(source.path).files] if is_local(source.path) else []
