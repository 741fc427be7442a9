"""Conversations tokenised once: `datasets.map` into a cached Arrow file, read back as views, over-long ones treated by a named policy."""

import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

from nanochat_hf.conversation import validate
from nanochat_hf.tasks import get_task

from .formats import convert_row, row_format
from .reports import BadRows
from .sources import JsonLines, load_source, parse_line, task_rows

OVERLONG = ("truncate", "split", "drop")
FORM_NAMES = {"list": "lists of messages", "task": "a task's rows"}


@dataclass
class SourceReport:
    """What became of one source: conversations and tokens as they will be trained on in an epoch, and how many were treated how."""

    label: str
    form: str
    copies: float
    conversations: int = 0
    tokens: int = 0
    trained: int = 0
    truncated: int = 0
    split: int = 0
    dropped: int = 0
    untrained: int = 0
    bad: int = 0
    first_bad: str = ""

    def __str__(self):
        treated = [f"{getattr(self, k):,} {text}" for k, text in TREATED.items() if getattr(self, k)]
        treated += [f"{self.bad:,} bad rows left out (the first: {self.first_bad})"] if self.bad else []
        return f"{self.label}: read as {FORM_NAMES.get(self.form, self.form)}, {', '.join([f'{self.conversations:,} documents', *treated])}"


TREATED = {
    "truncated": "truncated",
    "split": "split",
    "dropped": "dropped as too long",
    "untrained": "without a target left out",
}


def to_conversation(row, where, source):
    """A raw row of `source` (a parsed line, a dict, or a task's row) → a valid conversation; ConversationError begins with `where`."""
    if source.task:
        conversation = get_task(source.task).to_conversation(row)
    else:
        if source.columns and isinstance(row, dict):
            row = row | {new: row[old] for new, old in source.columns.items() if old in row}
        conversation = convert_row(row, where, source.converter)
    validate(conversation, where)
    return conversation


def conversations(source):
    """The validated conversations of a source, in order; errors name the file and the row."""
    rows = task_rows(source) if source.task else load_source(source, check=False)
    for number in range(len(rows)):
        where = rows.where(number) if isinstance(rows, JsonLines) else f"{source.label} row {source.start + number + 1}"
        yield to_conversation(rows[number], where, source)


class Render:
    """The function that datasets.map calls with a batch of rows; it gives {"ids": int32 lists, "mask": uint8 lists}, a row a conversation,
    and "bad": "" or, with `skip`, why the row is no conversation (then ids and mask are empty)."""

    def __init__(self, encoder, source, skip=False):
        self.encoder, self.source, self.skip = encoder, source, skip

    def __call__(self, batch, indices):
        import pyarrow as pa

        conversations, reasons = [], []
        for row, where in self._rows(batch, indices):
            try:
                conversations.append(to_conversation(row() if callable(row) else row, where, self.source))
                reasons.append("")
            except ValueError as error:
                if not self.skip:
                    raise
                reasons.append(str(error))
        ids, mask, lengths = self.encoder.render(conversations)
        rows = np.zeros(len(reasons), dtype=np.int64)
        rows[[not reason for reason in reasons]] = lengths
        offsets = pa.array(np.concatenate(([0], np.cumsum(rows))).astype(np.int32))
        return pa.table(
            {
                "ids": pa.ListArray.from_arrays(offsets, ids),
                "mask": pa.ListArray.from_arrays(offsets, mask),
                "bad": pa.array(reasons),
            }
        )

    def _rows(self, batch, indices):
        if set(batch) == {"line", "where"}:
            return [
                (partial(parse_line, line, where), where)
                for line, where in zip(batch["line"], batch["where"], strict=True)
            ]
        names, start = list(batch), self.source.start + 1
        values = zip(*batch.values(), strict=True)
        return [
            (dict(zip(names, row, strict=True)), f"{self.source.label} row {start + i}")
            for row, i in zip(values, indices, strict=True)
        ]


def raw_rows(source, skip=False):
    """(Dataset of raw rows, fingerprint of their content, the form they have). Rows of any shape travel as lines of JSON. With `skip` the
    form is that of the first row that has one."""
    from datasets import Dataset

    rows = task_rows(source) if source.task else load_source(source, check=False)
    if isinstance(rows, JsonLines):
        form = source.converter or _form(rows, source, skip)
        lines, places = rows.lines, [rows.where(i) for i in range(len(rows))]
    elif isinstance(rows, list):
        form = "task"
        lines, places = (
            [json.dumps(r).encode() for r in rows],
            [f"{source.label} row {source.start + i + 1}" for i in range(len(rows))],
        )
    else:
        form = "task" if source.task else source.converter or row_format(rows[0], source.label)
        return rows, rows._fingerprint, form
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line)
        digest.update(b"\n")
    return Dataset.from_dict({"line": lines, "where": places}), digest.hexdigest(), form


def _form(rows, source, skip):
    for number in range(len(rows)):
        try:
            return row_format(_renamed(rows[number], source), rows.where(number))
        except ValueError as error:
            if not skip or number + 1 == len(rows):
                raise error


def _renamed(row, source):
    return (
        row | {new: row.get(old) for new, old in source.columns.items()}
        if source.columns and isinstance(row, dict)
        else row
    )


def tokenise(source, encoder, *, num_proc=None, progress=False, bad_rows="error"):
    """All conversations of a source, rendered: (Dataset with columns ids, mask and bad, its form). Cached by the rows' content, the
    tokenizer and the template; processes that start together wait for the first, without a collective that could time out."""
    from pathlib import Path

    import datasets
    from filelock import FileLock

    with _bars(progress):
        rows, content, form = raw_rows(source, bad_rows == "skip")
    how = [
        encoder.fingerprint,
        content,
        source.task,
        source.start,
        source.columns,
        source.converter,
        "ids+mask+bad",
        bad_rows,
    ]
    fingerprint = hashlib.sha256(json.dumps(how).encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "nanochat_hf"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{fingerprint}.lock"), _bars(progress):
        done = rows.map(
            Render(encoder, source, bad_rows == "skip"),
            with_indices=True,
            batched=True,
            batch_size=500,
            remove_columns=rows.column_names,
            num_proc=num_proc if num_proc and num_proc > 1 else None,
            cache_file_name=str(folder / f"{fingerprint}.arrow"),
            new_fingerprint=fingerprint,
            desc=f"tokenising {source.label}",
            load_from_cache_file=True,
        )
    return done, form


@contextmanager
def _bars(shown):
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown, before = (
        shown and sys.stderr.isatty(),
        are_progress_bars_disabled(),
    )  # in a log file a bar is a page of noise
    (enable_progress_bars if shown else disable_progress_bars)()
    try:
        yield
    finally:
        (disable_progress_bars if before else enable_progress_bars)()


class TokenColumns:
    """Views into the Arrow file of a tokenised source: no copy, no Python list. `lengths` and `trained` count tokens per conversation."""

    def __init__(self, dataset):
        self.dataset = dataset
        self._open()
        self.lengths = np.concatenate([np.diff(offsets) for offsets, _, _ in self.chunks]).astype(np.int64)
        self.trained = np.concatenate([trained_tokens(offsets, mask) for offsets, _, mask in self.chunks])

    def _open(self):
        columns = [self.dataset.data.column(name).chunks for name in ("ids", "mask")]
        pairs = [(i, m) for i, m in zip(*columns, strict=True) if len(i)]
        self.chunks = [(i.offsets.to_numpy(), i.values.to_numpy(), m.values.to_numpy()) for i, m in pairs]
        sizes = [len(i) for i, _ in pairs]
        self.chunk = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        self.first = np.concatenate(([0], np.cumsum(sizes)))

    def __getstate__(self):  # a worker that is not forked maps the file itself
        return {"dataset": self.dataset, "lengths": self.lengths, "trained": self.trained}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def row(self, number):
        """(ids int32, mask uint8) of one conversation."""
        chunk = self.chunk[number]
        offsets, ids, mask = self.chunks[chunk]
        place = number - self.first[chunk]
        part = slice(offsets[place], offsets[place + 1])
        return ids[part], mask[part]


def trained_tokens(offsets, mask):
    """Ones of `mask` in each row that `offsets` borders: trained_tokens([0, 2, 2, 3], [0, 1, 1]) → [1, 0, 1]."""
    return np.diff(np.concatenate(([0], np.cumsum(mask, dtype=np.int64)))[offsets])


def cut(length, turns, capacity, policy):
    """The spans of an over-long conversation that are kept: cut(10, turns=[0, 4, 7], capacity=7, policy="split") → [(0, 7), (7, 10)].

    `turns` are the places where a user's message begins, the first being 0. "split" cuts before a user's message, so that no answer loses its
    question, and every later piece gets a bos of its own; a single turn that is too long is truncated. "truncate" keeps the beginning,
    "drop" nothing.
    """
    if policy == "drop":
        return []
    if policy == "truncate":
        return [(0, capacity)]
    spans, start, borders = [], 0, [*turns[1:], length]
    for here, following in zip(borders, [*borders[1:], None], strict=True):
        room = capacity - (start > 0)
        if following is None or following - start > room:
            spans.append((start, min(here, start + room)))
            start = here
    return spans


class Documents(Sequence):
    """Every document of a mixture, as often as its source is repeated: documents[i] → {"ids": int32, "mask": uint8 or None}."""

    def __init__(self, capacity, bos, user_start, *, overlong="truncate", train_on_all_tokens=False, seed=0):
        if overlong not in OVERLONG:
            raise ValueError(f"overlong={overlong!r} is unknown; choose from {', '.join(OVERLONG)}")
        self.capacity, self.bos, self.user_start, self.overlong = capacity, bos, user_start, overlong
        self.all, self.seed, self.columns, self.reports = train_on_all_tokens, seed, [], []
        self.spans = np.zeros((0, 4), dtype=np.int64)  # source, conversation, start, stop

    def add(self, source, dataset, form):
        """Take a tokenised source in; returns its SourceReport."""
        columns, report = TokenColumns(dataset), SourceReport(source.label, form, source.copies)
        number = len(self.columns)
        counted = BadRows(
            len(columns.lengths), int((columns.lengths == 0).sum())
        )  # a conversation has its <|bos|> at least
        if counted.bad:
            counted.reason = report.first_bad = next(filter(None, dataset["bad"]))
            counted.check(source.label)
        report.bad = counted.bad
        long = columns.lengths > self.capacity
        keep = np.flatnonzero(~long & (columns.lengths > 0) & (self.all | (columns.trained > 0)))
        report.untrained = int((~long).sum()) - len(keep) - report.bad
        spans = [np.stack((np.full(len(keep), number), keep, np.zeros_like(keep), columns.lengths[keep]), axis=1)]
        trained = [columns.trained[keep]]
        for row in np.flatnonzero(long):
            ids, mask = columns.row(row)
            turns = [0, *np.flatnonzero(ids == self.user_start)[1:]]
            pieces = cut(len(ids), turns, self.capacity, self.overlong)
            report.dropped += not pieces
            report.split += len(pieces) > 1
            report.truncated += sum(b - a for a, b in pieces) < len(ids) and bool(pieces)
            for a, b in pieces:
                if self.all or mask[a:b].any():
                    spans.append([[number, row, a, b]])
                    trained.append([mask[a:b].sum()])
                else:
                    report.untrained += 1
        spans, trained = np.concatenate(spans).astype(np.int64), np.concatenate(trained)
        chosen = self._copies(len(spans), source.copies, number)
        self.spans = np.concatenate((self.spans, spans[chosen]))
        self.columns.append(columns)
        report.conversations, report.trained = len(chosen), int(trained[chosen].sum())
        report.tokens = int(_lengths(spans[chosen]).sum())
        self.reports.append(report)
        return report

    def _copies(self, count, copies, number):
        whole, part = divmod(copies, 1)
        chosen = np.tile(np.arange(count), int(whole))
        if part:
            some = np.random.default_rng((self.seed, number)).permutation(count)[: round(part * count)]
            chosen = np.concatenate((chosen, np.sort(some)))
        return chosen

    @property
    def lengths(self):
        """Tokens of each document, int64 (len(documents),)."""
        return _lengths(self.spans)

    @property
    def digest(self):
        """A number that changes with the documents, their order and their lengths."""
        return hashlib.sha256(np.ascontiguousarray(self.spans).tobytes()).hexdigest()[:16]

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, index):
        number, row, start, stop = self.spans[index]
        ids, mask = self.columns[number].row(row)
        ids, mask = ids[start:stop], mask[start:stop]
        if start:
            ids, mask = np.concatenate(([self.bos], ids)).astype(np.int32), np.concatenate(([0], mask)).astype(np.uint8)
        return {"ids": ids, "mask": None if self.all else mask}


def _lengths(spans):
    return spans[:, 3] - spans[:, 2] + (spans[:, 2] > 0)
