"""Endless packed batches from documents that are read, tokenised and packed window by window, with state that resumes exactly.

A *consumer* is one worker of one rank. Every document of an epoch goes to exactly one consumer. A consumer's state is taken where a window
begins: the reader's place, the documents left over, and how many rows of the window are out. The window itself is made again on resuming,
by the same pure steps, so the state stays small whatever the window holds.
"""

import numpy as np
import torch

from .packing import pack_text, pack_window
from .sources import locate


class PackText:
    """Texts of a source → full rows of a window, see packing.pack_text. `column` holds the text, of a row or of a line of JSON."""

    documents, characters = (
        512,
        1_000_000,
    )  # a window: enough to pack well, little enough (0.3 s) for the queue to bridge

    def __init__(self, encoder, capacity, mode, column, source):
        self.encoder, self.capacity, self.mode, self.column, self.source = encoder, capacity, mode, column, source
        self.counts = {"read": 0, "cropped": 0}  # tokens

    def size(self, row):
        """Characters of a row's text; ValueError with its file and number where it is none."""
        if not isinstance(row.get(self.column), str):
            kind = type(row.get(self.column)).__name__
            raise ValueError(
                f"{locate(self.source, row)}: {self.column!r} holds {kind}; remove the row or give it text"
            )
        return len(row[self.column])

    def __call__(self, waiting, rows):
        bos = self.encoder.special["<|bos|>"]
        encoded = self.encoder.encode([row[self.column] for row in rows])
        documents = [d["ids"] for d in waiting] + [[bos, *ids] for ids in encoded if ids]
        packed, rest = pack_text(documents, self.capacity, self.mode, bos)
        self.counts["read"] += sum(len(ids) + 1 for ids in encoded if ids)
        if self.mode == "crop":
            self.counts["cropped"] += sum(map(len, documents)) - len(packed) * self.capacity - sum(map(len, rest))
        return [[{"ids": d} for d in row] for row in packed], [{"ids": d} for d in rest]


class PackConversations:
    """Rows of a mixture → packed conversations of a window, see packing.pack_window. `treat` renders and cuts one (number, row)."""

    documents, characters = 1024, 1_000_000

    def __init__(self, treat, capacity):
        self.treat, self.capacity = treat, capacity

    def size(self, row):
        """Characters of a row, about."""
        return len(str(row[1]))

    @property
    def counts(self):
        """What `treat` cut and left out."""
        return self.treat.counts

    def __call__(self, waiting, rows):
        documents = waiting + self.treat(rows)
        aged = set(range(len(waiting)))
        packed, rest = pack_window([len(d["ids"]) for d in documents], self.capacity, aged)
        return [[documents[i] for i in row] for row in packed], [documents[i] for i in rest]


class PackedStream(torch.utils.data.IterableDataset):
    """Endless (batch, consumer's news): news are (worker, state where the window begins or None, rows of the window that are
    out, epoch, what the packer counted)."""

    def __init__(self, reader, pack, collate, *, rows, rank, world_size, workers, seed):
        self.reader, self.pack, self.collate, self.rows, self.seed = reader, pack, collate, rows, seed
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.states, self.turn = [None] * workers, 0

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker = info.id if info else 0
        if worker < self.turn % self.workers:
            yield None  # a resumed loader asks worker 0 first, whoever's turn it is: those who had theirs pass
        yield from self._batches(worker, self.states[worker])

    def _batches(self, worker, state):
        state = state or {"reader": None, "waiting": [], "emitted": 0, "window": 0}
        reading, place = self.reader.open(self.rank, self.world_size, worker, self.workers, state["reader"])
        waiting, skip, window, batch = state["waiting"], state["emitted"], state["window"], []
        while True:
            snapshot = {"reader": place(), "waiting": waiting, "window": window}
            rows, epoch = self._window(reading)
            packed, waiting = self.pack(waiting, rows)
            order = np.random.default_rng((self.seed, self.rank, worker, window)).permutation(len(packed))
            for out, number in enumerate(order, 1):
                if out > skip:
                    batch.append(packed[number])
                if len(batch) == self.rows:
                    yield self.collate(batch), (worker, snapshot, out, epoch, dict(self.pack.counts))
                    snapshot, batch = None, []
            skip, window = 0, window + 1

    def _window(self, reading):
        rows, size = [], 0
        for row, epoch in reading:
            rows.append(row)
            size += self.pack.size(row)
            if len(rows) >= self.pack.documents or size >= self.pack.characters:
                return rows, epoch
