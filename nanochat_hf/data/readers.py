"""Readers hand out the rows of a source, each worker its share, with a state to go on from."""

import copy
from itertools import islice

import numpy as np

from .sources import unreadable


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
            raise ValueError(
                f"{self.label}: {len(self.rows)} documents cannot be dealt to {consumers} consumers; use fewer processes"
            )
        place = dict(state or {"epoch": 0, "position": 0})

        def rows():
            while True:
                order = np.random.default_rng((self.seed, place["epoch"])).permutation(len(self.rows))[
                    consumer::consumers
                ]
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
                    order = np.random.default_rng(
                        (self.seed, place["epoch"], rank, worker, place["number"])
                    ).permutation(len(block))
                    following = copy.deepcopy(stream.state_dict())
                    while place["position"] < len(block):
                        row = block[order[place["position"]]]
                        place["position"] += 1
                        yield row, place["epoch"]
                    place.update(block=following, number=place["number"] + 1, position=0)
                if empty:
                    raise ValueError(
                        f"{self.label}: no document for process {rank}, worker {worker}; use fewer processes or workers"
                    )
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
        opened = [
            r.open(rank, world_size, worker, workers, s) for r, s in zip(self.readers, state["readers"], strict=True)
        ]
        taken = list(state["taken"])

        def rows():
            while True:
                number = min(range(len(taken)), key=lambda i: ((taken[i] + 1) / self.weights[i], i))
                row, epoch = next(opened[number][0])
                taken[number] += 1
                yield (number, row), epoch

        return rows(), lambda: {"taken": list(taken), "readers": [place() for _, place in opened]}
