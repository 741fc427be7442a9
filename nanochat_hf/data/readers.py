"""Readers give each consumer its share of a source's raw rows, with a state to resume from.

A *consumer* is one worker of one rank. The rows that `start` and `rows` mean are chosen before they are shared out. So
for any number of consumers each chosen row is read by exactly one of them in an epoch, and no other row by any.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np

from nanochat_hf.files.data_file import Raw
from nanochat_hf.files.rows import Rows
from nanochat_hf.files.shards import Shard

from .loading import unreadable
from .sources import SourceConfig
from .workers import check_stopped

State = dict[str, Any]


class Consumer(NamedTuple):
    """Worker `worker` of `workers` on process `rank` of `world_size`."""

    rank: int
    world_size: int
    worker: int
    workers: int


class Reader(Protocol):
    """Gives out the rows of one source or of several."""

    def shares(self, wanted: int, world_size: int) -> int:
        """How many workers of a process can have rows of their own, `wanted` at most."""

    def open(
        self, consumer: Consumer, state: State | None = None
    ) -> tuple[Iterator[tuple[Any, float]], Callable[[], State]]:
        """(endless iterator of (row, epochs so far) for one consumer, function that returns its present state).

        The iterator begins at `state`, without one at the beginning.
        """


class MapReader:
    """Rows of a sequence, reshuffled every epoch; consumer c takes rows c, c + consumers, … of the epoch's order."""

    def __init__(self, rows: Rows, label: str, seed: int) -> None:
        self.rows, self.label, self.seed = rows, label, seed

    def shares(self, wanted: int, world_size: int) -> int:
        """As many workers as wanted: rows are shared out one by one."""
        return wanted

    def open(
        self, consumer: Consumer, state: State | None = None
    ) -> tuple[Iterator[tuple[Raw, float]], Callable[[], State]]:
        """As Reader.open."""
        number, consumers = consumer.rank * consumer.workers + consumer.worker, consumer.world_size * consumer.workers
        if number >= len(self.rows):
            raise ValueError(
                f"{self.label}: {len(self.rows)} documents cannot be dealt to {consumers} consumers; use fewer "
                "processes"
            )
        place: State = dict(state or {"epoch": 0, "position": 0})

        def rows() -> Iterator[tuple[Raw, float]]:
            while True:
                whole = np.random.default_rng((self.seed, place["epoch"])).permutation(len(self.rows))
                order = whole[number::consumers]
                while place["position"] < len(order):
                    check_stopped()
                    row = self.rows.raw(int(order[place["position"]]))
                    place["position"] += 1
                    yield row, place["epoch"] + place["position"] / len(order)
                place.update(epoch=place["epoch"] + 1, position=0)

        return rows(), lambda: dict(place)


@dataclass(frozen=True)
class Share:
    """The part of an epoch that one consumer reads: every `stride`-th row of `shards`, which are numbers in order.

    In the n-th of them (from 0) the first row is number (offset + n) % stride.
    """

    shards: list[int]
    stride: int = 1
    offset: int = 0


def share_of(order: Sequence[int], consumer: Consumer) -> Share:
    """The share of `consumer` in an epoch that takes the shards in `order`.

    Where the number of shards is a multiple of the processes, each process reads whole shards. Otherwise every process
    reads all shards and takes every world_size-th row. Either way the workers of a process divide its shards.

    >>> share_of([2, 0, 3, 1], Consumer(rank=1, world_size=2, worker=0, workers=1))
    Share(shards=[0, 1], stride=1, offset=0)
    >>> share_of([2, 0, 1], Consumer(rank=1, world_size=2, worker=0, workers=1))
    Share(shards=[2, 0, 1], stride=2, offset=1)
    """
    if len(order) % consumer.world_size:
        mine = list(order)[consumer.worker :: consumer.workers]
        return Share(mine, consumer.world_size, consumer.rank)
    return Share(list(order)[consumer.rank :: consumer.world_size][consumer.worker :: consumer.workers])


class StreamReader:
    """Rows of files that are read while training runs.

    Every epoch has another order of the shards. Rows are shuffled within blocks of `block` rows, and a resumed run
    reads its present block again.
    """

    def __init__(self, shards: Sequence[Shard], source: SourceConfig, seed: int, block: int = 1000) -> None:
        self.sharded, self.source, self.label, self.seed, self.block = list(shards), source, source.label, seed, block

    def shares(self, wanted: int, world_size: int) -> int:
        """At most as many workers as the process reads shards, see share_of."""
        shards = len(self.sharded)
        return max(1, min(wanted, shards if shards % world_size else shards // world_size))

    def open(
        self, consumer: Consumer, state: State | None = None
    ) -> tuple[Iterator[tuple[Raw, float]], Callable[[], State]]:
        """As Reader.open.

        The state holds where the present block begins, [position of the shard in the epoch, row of the shard], the
        number of the block, and how many of its rows were handed out.
        """
        place: State = dict(state or {"epoch": 0, "block": [0, 0], "number": 0, "position": 0})

        def rows() -> Iterator[tuple[Raw, float]]:
            while True:
                share = self._share(place["epoch"], consumer)
                reading, empty = self._from(share, *place["block"]), place["block"] == [0, 0]
                while block := self._some(reading):
                    empty = False
                    seed = (self.seed, place["epoch"], consumer.rank, consumer.worker, place["number"])
                    order = np.random.default_rng(seed).permutation(len(block))
                    _, *following = block[-1]
                    while place["position"] < len(block):
                        check_stopped()
                        row, *_ = block[order[place["position"]]]
                        place["position"] += 1
                        yield row, place["epoch"]
                    place.update(block=following, number=place["number"] + 1, position=0)
                if empty:
                    raise ValueError(
                        f"{self.label}: no document for process {consumer.rank}, worker {consumer.worker}; use "
                        "fewer processes or workers"
                    )
                place.update(epoch=place["epoch"] + 1, block=[0, 0], number=0, position=0)

        return rows(), lambda: place | {"block": list(place["block"])}

    def _share(self, epoch: int, consumer: Consumer) -> Share:
        order = np.random.default_rng((self.seed, epoch, len(self.sharded))).permutation(len(self.sharded))
        return share_of(order.tolist(), consumer)

    def _from(self, share: Share, position: int, skip: int) -> Iterator[tuple[Raw, int, int]]:
        """(row, position of its shard, rows of that shard read so far), from row `skip` of the shard at `position`."""
        for number in range(position, len(share.shards)):
            # another first row in each shard: otherwise the same processes would get the spare row of every shard
            turn = (share.offset + number) % share.stride
            for index, row in self.sharded[share.shards[number]].rows(skip):
                check_stopped()
                if index % share.stride == turn:
                    yield row, number, index + 1
            skip = 0

    def _some(self, reading: Iterator) -> list[tuple[Raw, int, int]]:
        try:
            return list(islice(reading, self.block))
        except Exception as error:  # each library has its own error for a file that breaks off
            raise unreadable(self.source, error) from error


class MixedReader:
    """Several readers in fixed proportion: the next row comes from the reader with the fewest rows for its weight.

    An epoch is over when the slowest reader has finished one.
    """

    def __init__(self, readers: Sequence[Reader], weights: Sequence[float]) -> None:
        self.readers, self.weights = list(readers), list(weights)

    def shares(self, wanted: int, world_size: int) -> int:
        """As Reader.shares: the number that every reader allows."""
        return min(reader.shares(wanted, world_size) for reader in self.readers)

    def open(
        self, consumer: Consumer, state: State | None = None
    ) -> tuple[Iterator[tuple[tuple[int, Raw], float]], Callable[[], State]]:
        """As Reader.open; a row is (number of its reader, row)."""
        count = len(self.readers)
        state = state or {"taken": [0] * count, "readers": [None] * count, "epochs": [0.0] * count}
        opened = [reader.open(consumer, s) for reader, s in zip(self.readers, state["readers"], strict=True)]
        taken = list(state["taken"])
        whole = [float(s.get("epoch", 0)) for s in state["readers"] if s]  # all that older checkpoints have
        epochs = list(state.get("epochs", whole))

        def rows() -> Iterator[tuple[tuple[int, Raw], float]]:
            while True:
                number = min(range(len(taken)), key=lambda i: ((taken[i] + 1) / self.weights[i], i))
                row, epochs[number] = next(opened[number][0])
                taken[number] += 1
                yield (number, row), min(epochs)

        def held() -> State:
            return {"taken": list(taken), "readers": [place() for _, place in opened], "epochs": list(epochs)}

        return rows(), held
