"""Endless packed batches from documents that are read, tokenised and packed window by window, with state that resumes exactly.

A *consumer* is one worker of one rank. Every document of an epoch goes to exactly one consumer. A consumer's state is taken where a window
begins: the reader's place, the documents left over, and how many rows of the window are out. The window itself is made again on resuming,
by the same pure steps, so the state stays small whatever the window holds.
"""

import copy
from itertools import islice

import numpy as np
import torch

from .packing import pack_text, pack_window
from .sources import locate, unreadable


class MapReader:
    """Rows of a sequence, reshuffled every epoch; consumer c takes rows c, c + consumers, … of the epoch's order."""

    def __init__(self, rows, label, seed):
        self.rows, self.label, self.seed = rows, label, seed

    def shares(self, wanted, world_size):
        """As many workers as asked for: rows are dealt out one by one."""
        return wanted

    def open(self, rank, world_size, worker, workers, state=None):
        """Endless (row, epochs gone by) of one consumer, from `state`; and a function that returns the state after the last row."""
        consumer, consumers = rank * workers + worker, world_size * workers
        if consumer >= len(self.rows):
            raise ValueError(f"{self.label}: {len(self.rows)} documents cannot be dealt to {consumers} consumers; use fewer processes")
        place = dict(state or {"epoch": 0, "position": 0})

        def rows():
            while True:
                order = np.random.default_rng((self.seed, place["epoch"])).permutation(len(self.rows))[consumer::consumers]
                while place["position"] < len(order):
                    row = self.rows[int(order[place["position"]])]
                    place["position"] += 1
                    yield row, place["epoch"] + place["position"] / len(order)
                place.update(epoch=place["epoch"] + 1, position=0)

        return rows(), lambda: dict(place)


class StreamReader:
    """Rows of a datasets.IterableDataset: every epoch the shards in another order, and the rows of each block of `block` shuffled.

    The block is drawn anew on resuming; a shuffle buffer of `datasets` would be lost.
    """

    def __init__(self, stream, source, seed, block=1000):
        self.stream, self.source, self.label, self.seed, self.block = stream, source, source.label, seed, block

    def shares(self, wanted, world_size):
        """At most as many workers as a process has shards, since a worker reads whole shards: its part of them where they divide by the
        processes, else all."""
        shards = self.stream.num_shards
        return max(1, min(wanted, shards if shards % world_size else shards // world_size))

    def open(self, rank, world_size, worker, workers, state=None):
        """As MapReader.open. In a DataLoader worker the stream splits itself once more, by worker."""
        from datasets.distributed import split_dataset_by_node

        place = dict(state or {"epoch": 0, "block": None, "number": 0, "position": 0})
        split = split_dataset_by_node(self.stream, rank=rank, world_size=world_size)

        def rows():
            while True:
                stream = copy.copy(split)  # fresh, for a loaded state would start every later epoch at its place
                stream.set_epoch(self.seed * 100_003 + place["epoch"] + 1)
                if place["block"] is not None:
                    stream.load_state_dict(copy.deepcopy(place["block"]))
                reading, empty = iter(stream), place["block"] is None
                while block := self._some(reading):
                    empty = False
                    order = np.random.default_rng((self.seed, place["epoch"], rank, worker, place["number"])).permutation(len(block))
                    following = copy.deepcopy(stream.state_dict())
                    while place["position"] < len(block):
                        row = block[order[place["position"]]]
                        place["position"] += 1
                        yield row, place["epoch"]
                    place.update(block=following, number=place["number"] + 1, position=0)
                if empty:
                    raise ValueError(f"{self.label}: no document for process {rank}, worker {worker}; use fewer processes or workers")
                place.update(epoch=place["epoch"] + 1, block=None, number=0, position=0)

        return rows(), lambda: copy.deepcopy(place)

    def _some(self, reading):
        try:
            return list(islice(reading, self.block))
        except Exception as error:  # a shard that breaks off: each library raises its own kind
            raise unreadable(self.source, error) from error


class MixedReader:
    """Several readers in fixed proportion: the next row comes from the reader furthest behind its weight."""

    def __init__(self, readers, weights):
        self.readers, self.weights = readers, weights

    def shares(self, wanted, world_size):
        """What all readers can share."""
        return min(reader.shares(wanted, world_size) for reader in self.readers)

    def open(self, rank, world_size, worker, workers, state=None):
        """As MapReader.open; a row is (number of the reader, row)."""
        state = state or {"taken": [0] * len(self.readers), "readers": [None] * len(self.readers)}
        opened = [r.open(rank, world_size, worker, workers, s) for r, s in zip(self.readers, state["readers"], strict=True)]
        taken = list(state["taken"])

        def rows():
            while True:
                number = min(range(len(taken)), key=lambda i: ((taken[i] + 1) / self.weights[i], i))
                row, epoch = next(opened[number][0])
                taken[number] += 1
                yield (number, row), epoch

        return rows(), lambda: {"taken": list(taken), "readers": [place() for _, place in opened]}


class PackText:
    """Texts of a source → full rows of a window, see packing.pack_text. `column` holds the text, of a row or of a line of JSON."""

    documents, characters = 512, 1_000_000  # a window: enough to pack well, little enough (0.3 s) for the queue to bridge

    def __init__(self, encoder, capacity, mode, column, source):
        self.encoder, self.capacity, self.mode, self.column, self.source = encoder, capacity, mode, column, source
        self.counts = {"read": 0, "cropped": 0}  # tokens

    def size(self, row):
        """Characters of a row's text; ValueError with its file and number where it is none."""
        if not isinstance(row.get(self.column), str):
            kind = type(row.get(self.column)).__name__
            raise ValueError(f"{locate(self.source, row)}: {self.column!r} holds {kind}; remove the row or give it text")
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
