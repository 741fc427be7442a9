"""Data sets → tokenised documents → planned rows → micro-batches of this rank, with exact state."""

import gzip
import json
import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .collate import PackingCollator
from .conversation import ConversationError, convert_row, render, validate
from .packing import plan_rows
from .tasks import get_task

BUILDERS = {".json": "json", ".jsonl": "json", ".gz": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


@dataclass(frozen=True)
class SourceConfig:
    """One data set of a mixture: a Hub name or local file(s) in `path`, or a `task`; the first `rows` of it, `repeat` times."""

    path: str | None = None
    name: str | None = None
    split: str = "train"
    task: str | None = None
    repeat: int = 1
    rows: int | None = None
    start: int = 0

    def __post_init__(self):
        if (self.path is None) == (self.task is None) and self.path is None:
            raise ValueError("a data source needs path or task; give one of them")
        if self.repeat < 1:
            raise ValueError(f"repeat={self.repeat} must be at least 1; leave the source out instead")

    @classmethod
    def from_recipe(cls, entry):
        """A mapping of a recipe → SourceConfig; ValueError names an unknown key."""
        unknown = set(entry) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"data source: unknown keys {', '.join(sorted(unknown))}; known are {', '.join(cls.__dataclass_fields__)}")
        return cls(**entry)


def load_source(source):
    """The rows of a path: a list for .jsonl(.gz) (so that a bad line is named), else a datasets.Dataset."""
    path = Path(source.path)
    if ".jsonl" in path.suffixes:
        rows = list(_json_lines(path))
    else:
        rows = _dataset(source, path)
    rows = rows[source.start :] if isinstance(rows, list) else rows.select(range(min(source.start, len(rows)), len(rows)))
    if source.rows is not None:
        rows = rows[: source.rows] if isinstance(rows, list) else rows.select(range(min(source.rows, len(rows))))
    if not len(rows):
        raise ValueError(f"{source.path}: no rows in split {source.split!r}; check start and rows")
    return rows


def _json_lines(path):
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give an existing data file")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path} line {number}: not JSON ({error.msg}); correct or remove it") from None


def _dataset(source, path):
    from datasets import load_dataset

    local = sorted(path.parent.glob(path.name)) if path.suffix in BUILDERS else []
    if path.suffix in BUILDERS and not local:
        raise ValueError(f"{path}: no such file; give an existing data file")
    try:
        if local:
            return load_dataset(BUILDERS[path.suffix], data_files=[str(p) for p in local], split="train")
        return load_dataset(source.path, source.name, split=source.split)
    except Exception as error:  # datasets raises its own kinds for each fault; the user needs the reason in one line
        raise ValueError(f"{source.path}: cannot be loaded ({str(error).splitlines()[0]}); check the name and the files") from error


def conversations(source):
    """The validated conversations of a source, in order; errors name the file and the row."""
    if source.task:
        task = get_task(source.task)
        rows = [task.to_conversation(row) for row in task.load(source.split, path=source.path, limit=source.rows)]
        yield from rows
        return
    for number, row in enumerate(load_source(source), source.start + 1):
        where = f"{source.path} line {number}"
        conversation = convert_row(row, where)
        validate(conversation, where)
        yield conversation


class SFTBatches:
    """Endless micro-batches of packed conversations. All rows of an epoch are planned before the first step; row g of the run
    is row g of epoch g // num_rows, so the state is one number and holds on any number of processes."""

    def __init__(
        self, sources, tokenizer, *, rows, positions, rank=0, world_size=1, seed=0, train_on_all_tokens=False, isolate=True, progress=False
    ):
        self.rows, self.rank, self.world_size, self.seed = rows, rank, world_size, seed
        self.documents, self.truncated, self.untrained = [], 0, 0
        for source in sources:
            listed = tqdm(conversations(source), desc=f"tokenising {source.task or source.path}", unit="conv", disable=not progress)
            documents = [d for c in listed if (d := self._document(tokenizer, c, positions + 1, train_on_all_tokens))]
            self.documents += documents * source.repeat
        if not self.documents:
            raise ValueError("no conversation has an assistant turn that fits the row; nothing could be trained on")
        lengths = [len(d["ids"]) for d in self.documents]
        self.plan = plan_rows(lengths, positions + 1)
        self.num_rows = len(self.plan)
        self.padding_share = 1 - sum(lengths) / (self.num_rows * (positions + 1))
        self.collate = PackingCollator(positions, tokenizer.pad_token_id, isolate)
        self.next_row, self._order = 0, (None, None)

    def _document(self, tokenizer, conversation, capacity, train_on_all_tokens):
        ids, mask = render(tokenizer, conversation)
        self.truncated += len(ids) > capacity
        ids, mask = ids[:capacity], mask[:capacity]
        if not any(mask):
            self.untrained += 1
            return None
        return {"ids": np.array(ids, dtype=np.int64), "mask": None if train_on_all_tokens else np.array(mask, dtype=bool)}

    @property
    def epoch(self):
        """Epochs gone by, as a float."""
        return self.next_row / self.num_rows

    def steps_per_epoch(self, accumulation):
        """Optimizer steps that see every row once."""
        return -(-self.num_rows // (self.rows * self.world_size * accumulation))

    def __iter__(self):
        while True:
            first = self.next_row + self.rank * self.rows
            self.next_row += self.rows * self.world_size
            yield self.collate([[self.documents[i] for i in self._row(g)] for g in range(first, first + self.rows)])

    def _row(self, g):
        epoch, index = divmod(g, self.num_rows)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.num_rows))
        return self.plan[self._order[1][index]]

    def state_dict(self):
        """The next row of the run and the plan's size."""
        return {"next_row": self.next_row, "num_rows": self.num_rows}

    def load_state_dict(self, state):
        """Continue there; ValueError when the data is not the same."""
        if state["num_rows"] != self.num_rows:
            raise ValueError(f"the checkpoint's data has {state['num_rows']} rows, this run's {self.num_rows}; resume with the same recipe")
        self.next_row = state["next_row"]


class TextBatches:
    """Endless micro-batches of plain text in full rows: best fit from a buffer; when nothing fits, the shortest document is cut.

    `mode` "crop" drops the rest of a cut document, "keep" puts it back for a later row. Each rank takes every world_size-th document.
    """

    BUFFER = 200

    def __init__(self, source, tokenizer, *, rows, positions, rank=0, world_size=1, seed=0, mode="crop", text_column="text", isolate=True):
        if mode not in ("crop", "keep"):
            raise ValueError(f"mode={mode!r} must be crop or keep")
        self.data, self.tokenizer, self.rows, self.positions = load_source(source), tokenizer, rows, positions
        columns = list(self.data[0])
        if text_column not in columns:
            raise ValueError(f"{source.path}: no column {text_column!r}; it has {', '.join(columns)}")
        self.rank, self.world_size, self.seed, self.mode, self.column = rank, world_size, seed, mode, text_column
        self.collate = PackingCollator(positions, tokenizer.pad_token_id, isolate)
        self.taken, self.buffer = 0, []

    @property
    def epoch(self):
        """Epochs gone by, as a float, this rank's documents taken as typical."""
        return self.taken * self.world_size / len(self.data)

    def _fill(self):
        while len(self.buffer) < self.BUFFER:
            numbers = [self._document(n) for n in range(self.taken, self.taken + 32)]
            self.taken += 32
            backend = self.tokenizer.backend_tokenizer
            backend.encode_special_tokens = True
            encoded = backend.encode_batch([self.data[n][self.column] for n in numbers], add_special_tokens=False)
            backend.encode_special_tokens = False
            self.buffer += [[self.tokenizer.bos_token_id, *e.ids] for e in encoded if e.ids]

    def _document(self, n):
        epoch, index = divmod(n * self.world_size + self.rank, len(self.data))
        if getattr(self, "_order", (None,))[0] != epoch:
            order = list(range(len(self.data)))
            random.Random(f"{self.seed}-{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][index]

    def _row(self):
        row, space = [], self.positions + 1
        while space:
            self._fill()
            fitting = [i for i, d in enumerate(self.buffer) if len(d) <= space]
            if fitting:
                document = self.buffer.pop(max(fitting, key=lambda i: len(self.buffer[i])))
            else:
                document = self.buffer.pop(min(range(len(self.buffer)), key=lambda i: len(self.buffer[i])))
                if self.mode == "keep":
                    self.buffer.append([self.tokenizer.bos_token_id, *document[space:]])
                document = document[:space]
            row.append({"ids": document})
            space -= len(document)
        return row

    def __iter__(self):
        while True:
            yield self.collate([self._row() for _ in range(self.rows)])

    def take(self, count):
        """The first `count` micro-batches as a list: a validation set."""
        return list(islice(self, count))

    def state_dict(self):
        """Documents taken and those still in the buffer."""
        return {"taken": self.taken, "buffer": [list(d) for d in self.buffer], "world_size": self.world_size}

    def load_state_dict(self, state):
        """Continue there; ValueError on another number of processes."""
        if state["world_size"] != self.world_size:
            raise ValueError(f"the checkpoint's stream is split over {state['world_size']} processes, this run has {self.world_size}")
        self.taken, self.buffer = state["taken"], [list(d) for d in state["buffer"]]


__all__ = ["ConversationError", "SFTBatches", "SourceConfig", "TextBatches", "conversations", "load_source"]
