"""Stop 4 for streams: endless packed batches from documents that are read, tokenised and packed window by window.

A *window* is a run of rows that are packed together. A consumer's state is that at the beginning of its window: the
reader's place, the documents left over from the window before, and how many rows of this window were handed out.
A resumed run makes the window again by the same pure steps. So the state is small and the resumed run is exact.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import numpy as np
import torch

from nanochat_hf.conversation import PlainEncoder
from nanochat_hf.files.data_file import Raw

from .conversations import Converted, convert
from .documents import Document, piece
from .overlong import Fit
from .packing import pack_text, pack_window
from .readers import Consumer, Reader
from .reports import ENOUGH, DataReport, SourceReport
from .sources import SourceConfig
from .texts import MixedTexts, Texts
from .weights import token_factors
from .workers import check_stopped

Row = list[Document]


class Packer(Protocol):
    """Rows of a window → packed rows. A window ends with `documents` rows or `characters` characters."""

    documents: int
    characters: int

    def read(self, row: Any) -> tuple[Any, int]:
        """(the item that is packed for a row, its size in characters); (None, 0) for a bad row that is left out."""

    def __call__(self, waiting: list[Document], items: list[Any]) -> tuple[list[Row], list[Document]]:
        """(rows that are full enough, documents that wait for the next window)."""

    def news(self) -> dict[str, Any]:
        """The counts so far, as plain values."""

    def recall(self, news: dict[str, Any]) -> None:
        """Go on counting from `news`."""

    def nothing(self) -> ValueError:
        """The error for data that gave no document in a whole epoch."""


class PackText:
    """Texts of a source, or of several → full rows of a window, see packing.pack_text."""

    # enough documents to pack well, few enough (0.3 s of work) that the batches made ahead last until they are packed
    documents, characters = 512, 1_000_000

    def __init__(self, encoder: PlainEncoder, capacity: int, mode: str, texts: Texts | MixedTexts) -> None:
        self.encoder, self.capacity, self.mode, self.texts = encoder, capacity, mode, texts
        self.counts = {"read": 0, "cropped": 0}  # tokens

    def read(self, row: Any) -> tuple[str | None, int]:
        """As Packer.read; ValueError with the row's place where it has no text."""
        text = self.texts.text(row)
        return text, len(text or "")

    def __call__(self, waiting: list[Document], items: list[str]) -> tuple[list[Row], list[Document]]:
        """As Packer."""
        bos = self.encoder.special["<|bos|>"]
        encoded = self.encoder.encode(items)
        documents = [d["ids"] for d in waiting] + [[bos, *ids] for ids in encoded if ids]
        packed, rest = pack_text(documents, self.capacity, self.mode, bos)
        self.counts["read"] += sum(len(ids) + 1 for ids in encoded if ids)
        if self.mode == "crop":
            self.counts["cropped"] += sum(map(len, documents)) - len(packed) * self.capacity - sum(map(len, rest))
        return [[{"ids": d} for d in row] for row in packed], [{"ids": d} for d in rest]

    def news(self) -> dict[str, Any]:
        """As Packer.news."""
        return self.counts | {"report": DataReport(self.texts.reports).state()}

    def recall(self, news: dict[str, Any]) -> None:
        """As Packer.recall."""
        self.counts = {name: int(news[name]) for name in self.counts}
        self.texts.recall(DataReport.merged([news["report"]]).sources)

    def nothing(self) -> ValueError:
        """As Packer.nothing."""
        return self.texts.nothing()


class PackConversations:
    """Rows of a mixture, (number of the source, row) → packed conversations of a window, see packing.pack_window."""

    documents, characters = 1024, 1_000_000

    def __init__(self, sources: list[SourceConfig], encoder: PlainEncoder, fit: Fit, skip: bool = False) -> None:
        self.sources, self.encoder, self.fit, self.skip = sources, encoder, fit, skip
        self.reset()

    def reset(self) -> None:
        """Set all counts to 0."""
        self.reports = [SourceReport(source.label, "", source.copies) for source in self.sources]

    def read(self, row: tuple[int, Raw]) -> tuple[tuple[int, Converted] | None, int]:
        """As Packer.read; ValueError with the row's place where it is no conversation."""
        number, raw = row
        report = self.reports[number]
        report.seen += 1
        try:
            converted = convert(raw, self.sources[number])
        except ValueError as error:
            report.add_bad(error, self.skip)
            if report.seen >= ENOUGH:
                report.check_bad()
            return None, 0
        for name in converted.ignored:
            report.ignored[name] = report.ignored.get(name, 0) + 1
        return (number, converted), len(str(raw.value))

    def __call__(self, waiting: list[Document], items: list[tuple[int, Converted]]) -> tuple[list[Row], list[Document]]:
        """As Packer."""
        documents = waiting + self.rendered(items)
        aged = set(range(len(waiting)))
        packed, rest = pack_window([len(d["ids"]) for d in documents], self.fit.capacity, aged)
        return [[documents[i] for i in row] for row in packed], [documents[i] for i in rest]

    def rendered(self, items: list[tuple[int, Converted]]) -> list[Document]:
        """Conversations → documents that fit into a row; those without a target are left out and counted."""
        if not items:
            return []
        ids, mask, lengths = self.encoder.render([converted.conversation for _, converted in items])
        ends = np.cumsum(lengths)
        documents = []
        for (number, converted), start, end in zip(items, ends - lengths, ends, strict=True):
            own, targets, factors = ids[start:end], mask[start:end], None
            if converted.weights is not None:
                targets = targets.copy()
                factors = token_factors(own, self.encoder.special, converted.weights)
                targets[factors == 0] = 0
            report = self.reports[number]
            for a, b in self.fit.spans(own, targets, report):
                documents.append(_plain(piece(own, targets, factors, (a, b), self.fit)))
                report.conversations += 1
                report.tokens += b - a
                report.trained += int(targets[a:b].sum())
        return documents

    def news(self) -> dict[str, Any]:
        """As Packer.news."""
        return {"report": DataReport(self.reports).state()}

    def recall(self, news: dict[str, Any]) -> None:
        """As Packer.recall."""
        self.reports = DataReport.merged([news["report"]]).sources

    def nothing(self) -> ValueError:
        """As Packer.nothing."""
        return DataReport(self.reports).nothing(self.fit.capacity - 1)


def _plain(document: Document) -> Document:
    """The document with lists instead of arrays, since documents that wait become part of the state."""
    plain = {key: None if value is None else np.asarray(value).tolist() for key, value in document.items()}
    return cast(Document, plain)


class PackedStream(torch.utils.data.IterableDataset):
    """Endless (batch, news of the consumer that made it).

    The news are (worker, state at the beginning of the window, rows of the window handed out, passes over the data,
    the packer's counts). The state comes with the first batch of a window alone; later batches have None. A window is
    read ahead of its rows, so within it the passes grow with the rows that are handed out.
    """

    def __init__(
        self, reader: Reader, pack: Packer, collate: Callable, *, rows: int, seed: int, share: tuple[int, int, int]
    ) -> None:
        self.reader, self.pack, self.collate, self.rows, self.seed = reader, pack, collate, rows, seed
        self.rank, self.world_size, self.workers = share
        self.states: list[dict | None] = [None] * self.workers
        self.turn = 0

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        worker = info.id if info else 0
        if worker < self.turn % self.workers:
            yield None  # a resumed loader asks worker 0 first; a worker whose turn has been passes
        yield from self._batches(worker, self.states[worker])

    def _batches(self, worker: int, state: dict | None) -> Iterator[Any]:
        state = state or {"reader": None, "waiting": [], "emitted": 0, "window": 0}
        consumer = Consumer(self.rank, self.world_size, worker, self.workers)
        reading, place = self.reader.open(consumer, state["reader"])
        waiting, skip, window = state["waiting"], state["emitted"], state["window"]
        passes = state.get("epoch", 0.0)  # checkpoints of older versions have neither this nor the counts
        if "counts" in state:
            self.pack.recall(state["counts"])
        batch: list[Row] = []
        gave, begun = bool(waiting or window), None
        while True:
            snapshot = {"reader": place(), "waiting": waiting, "window": window}
            snapshot |= {"epoch": passes, "counts": self.pack.news()}
            items, epoch = self._window(reading)
            packed, waiting = self.pack(waiting, items)
            begun = int(epoch) if begun is None else begun
            gave = gave or bool(packed or waiting)
            if not gave and epoch >= begun + 1:
                raise self.pack.nothing()
            order = np.random.default_rng((self.seed, self.rank, worker, window)).permutation(len(packed))
            for out, number in enumerate(order, 1):
                if out > skip:
                    batch.append(packed[number])
                if len(batch) == self.rows:
                    done = passes + (epoch - passes) * out / len(packed)
                    yield self.collate(batch), (worker, snapshot, out, done, self.pack.news())
                    snapshot, batch = None, []
            skip, window, passes = 0, window + 1, epoch

    def _window(self, reading: Iterator[tuple[Any, float]]) -> tuple[list[Any], float]:
        items, count, size, epoch = [], 0, 0, 0.0
        while count < self.pack.documents and size < self.pack.characters:
            check_stopped()
            row, epoch = next(reading)
            item, characters = self.pack.read(row)
            count, size = count + 1, size + characters
            if item is not None:
                items.append(item)
        return items, epoch
