"""Stop 3a: conversations → token ids and masks, by `datasets.map` into an Arrow file that later runs use again."""

import hashlib
import json
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import nanochat_hf.conversation
import nanochat_hf.messages
from nanochat_hf.conversation import PlainEncoder
from nanochat_hf.files.data_file import Raw
from nanochat_hf.files.rows import LineRows, Rows, TableRows
from nanochat_hf.tasks import get_task

from . import columns, conversations, formats, tool_calls, weights
from .code_key import code_key
from .columns import renamed
from .conversations import Converted, convert
from .formats import row_format
from .loading import load_source
from .sources import SourceConfig
from .weights import token_factors

if TYPE_CHECKING:  # datasets is imported where it is used
    from datasets import Dataset

BATCH = 500  # rows that are rendered at once
MAKERS = (
    nanochat_hf.conversation,
    nanochat_hf.messages,
    columns,
    conversations,
    formats,
    tool_calls,
    weights,
    sys.modules[__name__],
)
SEPARATOR = "\x1f"  # between the names of ignored columns


class Render:
    """The function that datasets.map calls with a batch of rows; each row becomes a row of five columns.

    `ids` are int32 lists, `mask` uint8 lists with 1 where a token is a target, `factors` float32 lists, empty where all
    factors are 1. `ignored` holds names of columns. `bad` is "", or with `skip` the reason why the row is no
    conversation; then its lists are empty.
    """

    def __init__(
        self, encoder: PlainEncoder, source: SourceConfig, skip: bool, place: Callable | None, strip: Callable | None
    ) -> None:
        self.encoder, self.source, self.skip, self.place, self.strip = encoder, source, skip, place, strip

    def __call__(self, batch: Any, indices: list[int]) -> Any:
        """A pyarrow.Table of the batch's rows."""
        import pyarrow as pa

        converted: list[Converted] = []
        reasons: list[str] = []
        for raw in self._rows(batch, indices):
            try:
                converted.append(convert(raw, self.source))
                reasons.append("")
            except ValueError as error:
                if not self.skip:
                    raise
                reasons.append(str(error))
        ids, mask, lengths = self.encoder.render([c.conversation for c in converted])
        ends = np.cumsum(lengths)
        good = np.array([not reason for reason in reasons], dtype=bool)
        factors = []
        for c, start, end in zip(converted, ends - lengths, ends, strict=True):
            factors.append(
                np.zeros(0, np.float32)
                if c.weights is None
                else token_factors(ids[start:end], self.encoder.special, c.weights)
            )
            if c.weights is not None:
                mask[start:end][factors[-1] == 0] = 0
        named = iter(SEPARATOR.join(c.ignored) for c in converted)
        return pa.table(
            {
                "ids": _lists(ids, lengths, good),
                "mask": _lists(mask, lengths, good),
                "factors": _lists(np.concatenate([*factors, np.zeros(0, np.float32)]), [len(f) for f in factors], good),
                "ignored": pa.array([next(named) if ok else "" for ok in good]),
                "bad": pa.array(reasons),
            }
        )

    def _rows(self, batch: Any, indices: list[int]) -> Iterator[Raw]:
        if self.place is None:
            yield from map(Raw, batch["line"], batch["where"])
            return
        names = list(batch)
        for values, index in zip(zip(*batch.values(), strict=True), indices, strict=True):
            row = dict(zip(names, values, strict=True))
            yield Raw(self.strip(row) if self.strip else row, self.place(index))


def _lists(values: np.ndarray, lengths: Any, good: np.ndarray) -> Any:
    """An Arrow column of lists of `values`; `lengths` are those of the `good` rows, the others get an empty list."""
    import pyarrow as pa

    sizes = np.zeros(len(good), dtype=np.int64)
    sizes[good] = lengths
    return pa.ListArray.from_arrays(pa.array(np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)), values)


def raw_rows(rows: Rows) -> tuple["Dataset", str]:
    """(Dataset of raw rows, digest of their content); rows that are no table become lines of JSON with their place."""
    from datasets import Dataset

    if isinstance(rows, TableRows):
        return rows.dataset, rows.dataset._fingerprint
    lines = rows.lines if isinstance(rows, LineRows) else [json.dumps(row).encode() for row in rows]
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line)
        digest.update(b"\n")
    where = [rows.where(i) for i in range(len(rows))]
    return Dataset.from_dict({"line": lines, "where": where}), digest.hexdigest()


def form_of(rows: Rows, source: SourceConfig, skip: bool) -> str:
    """The form of the first row; with `skip` that of the first row that has a form."""
    if source.task or source.converter:
        return source.converter or "task"
    for number in range(len(rows)):
        try:
            return row_format(renamed(rows[number], source.columns, rows.where(number)), rows.where(number))
        except ValueError:
            if not skip or number + 1 == len(rows):
                raise
    raise ValueError(f"{source.label}: no rows; check start and rows")


def tokenise(
    source: SourceConfig,
    encoder: PlainEncoder,
    *,
    num_proc: int | None = None,
    progress: bool = False,
    bad_rows: str = "error",
) -> tuple["Dataset", str]:
    """All conversations of a source, rendered: (Dataset with the columns of Render, the form of its rows).

    The result is cached under a key of everything that decides it: the content, the tokenizer and the template, the
    settings, and the code of the task and of the conversion. Processes that start together wait at a file lock for the
    first of them: a collective would time out on large data.
    """
    import datasets.config
    from filelock import FileLock

    with bars(progress):
        rows = load_source(source)
        raw, content = raw_rows(rows)
        form = form_of(rows, source, bad_rows == "skip")
    maker = [get_task(source.task).to_conversation] if source.task else []
    chosen = [source.task, source.split, source.start, source.columns, source.converter, bad_rows]
    how = [encoder.fingerprint, content, code_key(maker, MAKERS), *chosen]
    fingerprint = hashlib.sha256(json.dumps(how).encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "nanochat_hf"
    folder.mkdir(parents=True, exist_ok=True)
    is_table = isinstance(rows, TableRows)
    place, strip = (rows.places, rows.strip) if is_table else (None, None)
    with FileLock(folder / f"{fingerprint}.lock"), bars(progress):
        done = raw.map(
            Render(encoder, source, bad_rows == "skip", place, strip),
            with_indices=True,
            batched=True,
            batch_size=BATCH,
            remove_columns=raw.column_names,
            num_proc=num_proc if num_proc and num_proc > 1 else None,
            cache_file_name=str(folder / f"{fingerprint}.arrow"),
            new_fingerprint=fingerprint,
            desc=f"tokenising {source.label}",
            load_from_cache_file=True,
        )
    return done, form


@contextmanager
def bars(shown: bool) -> Generator[None]:
    """Show the progress bars of datasets where `shown` and stderr is a terminal; in a log a bar fills pages."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    (enable_progress_bars if shown and sys.stderr.isatty() else disable_progress_bars)()
    try:
        yield
    finally:
        (disable_progress_bars if before else enable_progress_bars)()
