"""Stop 6b: endless batches packed window by window: plain text, mapped or streamed, and streamed conversations."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from nanochat_hf.conversation import PlainEncoder

from .batches import without_targets
from .collate import Batch, PackingCollator
from .identity import identity
from .loading import load_shards, load_source, unread
from .overlong import Fit
from .readers import Consumer, MapReader, MixedReader, Reader, StreamReader
from .reports import DataReport, Reported, check_policy
from .sources import SourceConfig
from .texts import MixedTexts, Texts
from .windows import PackConversations, PackedStream, Packer, PackText, Row
from .workers import ahead, first, plain_errors, worker_loader


@dataclass(frozen=True)
class Shape:
    """How batches are made: `rows` a batch, for process `rank` of `world_size`.

    `num_workers` processes make them, with 0 a thread; `prefetch` batches are kept ready.
    """

    rows: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    num_workers: int = 0
    prefetch: int = 2


class _Windows(Reported):
    """Endless micro-batches out of a PackedStream: the loader, and the state of what was handed out."""

    def __init__(
        self, reader: Reader, pack: Packer, collate: PackingCollator, shape: Shape, settings: dict, data: list[str]
    ) -> None:
        self.shape = shape
        wanted = shape.num_workers
        self.num_workers = reader.shares(wanted, shape.world_size) if wanted else 0
        if self.num_workers < wanted:
            print(f"{self.num_workers} of {wanted} data workers: the data has no more shards for them", flush=True)
        workers = max(1, self.num_workers)
        share = (shape.rank, shape.world_size, workers)
        self.stream = PackedStream(reader, pack, collate, rows=shape.rows, seed=shape.seed, share=share)
        self.settings, self.data = settings | {"rows": shape.rows, "seed": shape.seed}, data
        self.states: list[dict | None] = [None] * workers
        self.turn = 0
        self.epochs = [0.0] * workers
        self.counts: list[dict[str, Any]] = [pack.news()] * workers

    def __iter__(self) -> Iterator[Batch]:
        self.stream.states, self.stream.turn = list(self.states), self.turn
        if self.num_workers:
            made = plain_errors(worker_loader(self.stream, num_workers=self.num_workers, prefetch=self.shape.prefetch))
        else:
            made = ahead(iter(self.stream), self.shape.prefetch)
        for item in made:
            if item is None:
                continue
            batch, (worker, snapshot, emitted, self.epochs[worker], self.counts[worker]) = item
            self.states[worker] = (snapshot or self.states[worker] or {}) | {"emitted": emitted}
            self.turn = (worker + 1) % len(self.states)
            yield batch

    @property
    def epoch(self) -> float:
        """Passes over the data so far, of the batches handed out."""
        return sum(self.epochs) / len(self.epochs)

    @property
    def report(self) -> DataReport:
        """What became of the rows read so far."""
        return DataReport.merged(counts["report"] for counts in self.counts)

    def take(self, count: int) -> list[Batch]:
        """The next `count` micro-batches."""
        return first(self, count)

    def state_dict(self) -> dict[str, Any]:
        """Each worker's place in the stream, how the stream is split over workers, and the identity of the data."""
        split = {"world_size": self.shape.world_size, "workers": len(self.states)}
        held = {"states": list(self.states), "turn": self.turn, "epoch": self.epoch}
        held |= {"epochs": list(self.epochs), "counts": list(self.counts)}
        return held | {"settings": self.settings, "data": self.data} | split

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at `state`; ValueError for other data, or where the stream was split or packed in another way."""
        for name, own, what in (
            ("world_size", self.shape.world_size, "processes"),
            ("workers", len(self.states), "data workers each"),
        ):
            if state[name] != own:
                raise ValueError(
                    f"the checkpoint's stream is split over {state[name]} {what}, this run has {own}; resume with "
                    f"{state[name]}"
                )
        for name, value in self.settings.items():
            theirs = state["settings"].get(name, "error" if name == "bad_rows" else None)  # absent in older checkpoints
            if theirs != value:
                raise ValueError(
                    f"the checkpoint's stream has {name}={theirs}, this run {value}; resume with the former"
                )
        for theirs, own in zip_longest(state.get("data", self.data), self.data):  # absent in older checkpoints
            if theirs != own:
                raise ValueError(
                    f"the checkpoint's stream is of {theirs}, this run's of {own}; resume with the former, or begin "
                    "anew without --resume"
                )
        for held in state["states"]:
            _check_place(held["reader"] if held else None)
        counts = state.get("counts", self.counts)  # absent in older checkpoints, as are the epochs of each worker
        DataReport.merged(each["report"] for each in counts)  # a malformed one shows now, not in a worker
        self.states, self.turn, self.counts = list(state["states"]), state["turn"], list(counts)
        self.epochs = list(state.get("epochs", [state["epoch"]] * len(self.states)))


def _check_place(place: Any) -> None:
    """ValueError for a place in a stream that an older version wrote: it counted rows in another way."""
    for part in place.get("readers", [place]) if place else ():
        if isinstance(part, dict) and not isinstance(part.get("block", []), list):
            raise ValueError(
                "the checkpoint's place in the stream is of an older version; begin anew without --resume, or use "
                "that version"
            )


class TextBatches(_Windows):
    """Endless micro-batches of plain text in full rows: best fit from a window of documents.

    Where no document fits, the shortest is cut. `mode` "crop" drops its rest, "keep" puts it back for a later row.
    `streaming` reads without downloading first. In an epoch each document goes to one process and worker. Several
    sources give documents in proportion to their weight (or repeat).
    ValueError before the first batch for data without `text_column`. A row without text is a ValueError too; with
    `bad_rows` "skip" it is left out and counted.
    """

    def __init__(  # noqa: PLR0913 - a run has a flag for each, given by name
        self,
        source: SourceConfig | Sequence[SourceConfig],
        tokenizer: PreTrainedTokenizerBase,
        *,
        rows: int,
        positions: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        mode: str = "crop",
        text_column: str = "text",
        isolate: bool = True,
        streaming: bool = False,
        bad_rows: str = "error",
        num_workers: int = 0,
        prefetch: int = 2,
    ) -> None:
        if mode not in ("crop", "keep"):
            raise ValueError(f"mode={mode!r} must be crop or keep")
        sources = [source] if isinstance(source, SourceConfig) else list(source)
        parts = [Texts(part, text_column, streaming=streaming, bad_rows=bad_rows) for part in sources]
        readers = [_text_reader(part, seed, world_size) for part in parts]
        single = len(parts) == 1
        self.texts = parts[0] if single else MixedTexts(parts)
        self.positions, self.once_report = positions, DataReport([])
        reader = readers[0] if single else MixedReader(readers, [part.copies for part in sources])
        settings: dict[str, Any] = {"positions": positions, "mode": mode, "streaming": streaming}
        super().__init__(
            reader,
            PackText(PlainEncoder(tokenizer), positions + 1, mode, self.texts),
            PackingCollator(positions, tokenizer.pad_token_id, isolate),
            Shape(rows, rank, world_size, seed, num_workers, prefetch),
            settings | ({"bad_rows": bad_rows} if bad_rows != "error" else {}),
            [identity(part, own) for part, own in zip(sources, readers, strict=True)],
        )

    def once(self, count: int) -> list[Batch]:
        """The first `count` micro-batches of one pass over the documents in order: a validation set.

        They are the same on every rank, and no document counts twice. There are fewer where the documents fill fewer;
        rows that only fill up the last batch have no targets. `once_report` then says what became of their rows.
        """
        pack, wanted = self._fresh_pack(), count * self.shape.rows
        packed: list[Row] = []
        waiting: list[Any] = []
        for items in self._passage(pack):
            made, waiting = pack(waiting, items)
            packed += made
            if len(packed) >= wanted:
                break
        else:
            packed += [waiting] if waiting else []  # less than a row
        self.once_report = DataReport(pack.texts.reports)
        if not packed:
            raise pack.nothing()
        packed = packed[:wanted]
        empty = -len(packed) % self.shape.rows
        packed += [[] for _ in range(empty)]
        size = self.shape.rows
        batches = [self.stream.collate(packed[i : i + size]) for i in range(0, len(packed), size)]
        without_targets(batches[-1], empty)
        return batches

    def outlook(self, tokens: int) -> float:
        """The share of tokens that cropping drops, measured on the first documents that hold `tokens` tokens.

        It is 0 in mode "keep". ValueError where all the data holds fewer tokens than that, since one step would then
        see a document twice.
        """
        pack, waiting = self._fresh_pack(), []
        for items in self._passage(pack):
            _, waiting = pack(waiting, items)
            if pack.counts["read"] >= tokens:
                return pack.counts["cropped"] / pack.counts["read"]
        if not pack.counts["read"]:
            raise pack.nothing()
        labels = " and ".join(report.label for report in self.texts.reports)
        raise ValueError(
            f"{labels}: {pack.counts['read']:,} tokens are fewer than the {tokens:,} of one step; "
            "give more text or lower --total-batch-size, --device-batch-size or --max-seq-len"
        )

    def _fresh_pack(self) -> PackText:
        """A copy of the packer with its own counts, so that rows read for a look do not count as trained on."""
        pack = cast(PackText, copy.copy(self.stream.pack))  # the one that the constructor made
        pack.texts = self.texts.fresh()
        pack.counts = dict.fromkeys(pack.counts, 0)
        return pack

    def _passage(self, pack: PackText) -> Iterator[list[str]]:
        """The texts of all rows once, window by window."""
        texts = iter(pack.texts)
        while window := list(islice(texts, pack.documents)):
            yield window


class StreamedConversations(_Windows):
    """Endless micro-batches of conversations that are read as a stream.

    Nothing is downloaded or planned first, so the number of rows is unknown. The sources give rows in proportion to
    their weight (or repeat). Sources that are tasks are read whole.
    """

    def __init__(  # noqa: PLR0913 - a run has a flag for each, given by name
        self,
        sources: Sequence[SourceConfig],
        tokenizer: PreTrainedTokenizerBase,
        *,
        rows: int,
        positions: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        train_on_all_tokens: bool = False,
        isolate: bool = True,
        overlong: str = "truncate",
        bad_rows: str = "error",
        num_workers: int = 0,
        prefetch: int = 2,
    ) -> None:
        check_policy(bad_rows)
        encoder = PlainEncoder(tokenizer)
        special = encoder.special
        fit = Fit(positions + 1, special["<|bos|>"], special["<|user_start|>"], overlong, train_on_all_tokens)
        pack = PackConversations(list(sources), encoder, fit, bad_rows == "skip")
        readers = [_reader(source, seed, world_size) for source in sources]
        for number, reader in enumerate(readers):  # the first row of each source, so that a wrong form shows at once
            rows_, _ = reader.open(Consumer(rank, world_size, 0, 1))
            item, _ = pack.read((number, next(rows_)[0]))
            pack.rendered([item] if item else [])
        pack.reset()
        for report, source in zip(pack.reports, sources, strict=True):
            report.unread = unread(source)
        settings = {"positions": positions, "overlong": overlong, "bad_rows": bad_rows, "sources": len(sources)}
        super().__init__(
            MixedReader(readers, [source.copies for source in sources]),
            pack,
            PackingCollator(positions, tokenizer.pad_token_id, isolate),
            Shape(rows, rank, world_size, seed, num_workers, prefetch),
            settings,
            [identity(source, reader) for source, reader in zip(sources, readers, strict=True)],
        )


def _text_reader(texts: Texts, seed: int, world_size: int) -> Reader:
    if texts.rows is not None:
        return MapReader(texts.rows, texts.source.label, seed)
    _tell_uneven(texts.source, len(texts.shards), world_size)
    return StreamReader(texts.shards, texts.source, seed)


def _reader(source: SourceConfig, seed: int, world_size: int) -> Reader:
    if source.task:
        return MapReader(load_source(source), source.label, seed)
    shards = load_shards(source)
    _tell_uneven(source, len(shards), world_size)
    return StreamReader(shards, source, seed)


def _tell_uneven(source: SourceConfig, shards: int, world_size: int) -> None:
    if shards % world_size:
        print(
            f"{source.label}: {shards} shards do not divide by {world_size} processes, so each reads all of them "
            "and takes its share",
            flush=True,
        )
