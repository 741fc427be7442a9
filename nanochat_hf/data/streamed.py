"""Endless batches of windows of documents: plain text, mapped or streamed, and streamed conversations."""

import copy

import numpy as np

from nanochat_hf.conversation import ConversationError, PlainEncoder

from .collate import PackingCollator
from .documents import OVERLONG, cut, to_conversation
from .identity import identity
from .readers import MapReader, MixedReader, StreamReader
from .reports import ENOUGH, BadRows, check_policy
from .sources import load_source, load_stream, locate, parse_line, task_rows
from .texts import JsonText, check_column
from .windows import PackConversations, PackedStream, PackText
from .workers import ahead, first, plain_errors, worker_loader


class _Windows:
    """Endless micro-batches out of a PackedStream: the loader, and the state of what was handed out."""

    def __init__(self, reader, pack, collate, *, rows, rank, world_size, seed, num_workers, prefetch, settings, data):
        self.rank, self.world_size, self.seed, self.prefetch = rank, world_size, seed, prefetch
        self.num_workers = reader.shares(num_workers, world_size) if num_workers else 0
        if self.num_workers < num_workers:
            print(f"{self.num_workers} of {num_workers} data workers: the data has no more shards for them", flush=True)
        workers = max(1, self.num_workers)
        self.stream = PackedStream(
            reader, pack, collate, rows=rows, rank=rank, world_size=world_size, workers=workers, seed=seed
        )
        self.settings, self.data = settings | {"rows": rows, "seed": seed}, data
        self.states, self.turn, self.epoch, self.counts = [None] * workers, 0, 0.0, [{}] * workers

    def __iter__(self):
        self.stream.states, self.stream.turn = list(self.states), self.turn
        if self.num_workers:
            made = plain_errors(worker_loader(self.stream, num_workers=self.num_workers, prefetch=self.prefetch))
        else:
            made = ahead(iter(self.stream), self.prefetch)
        for item in made:
            if item is None:
                continue
            batch, (worker, snapshot, emitted, self.epoch, self.counts[worker]) = item
            self.states[worker] = (snapshot or self.states[worker]) | {"emitted": emitted}
            self.turn = (worker + 1) % len(self.states)
            yield batch

    @property
    def truncated(self):
        """Conversations that lost their end, of the windows read since the start or the resume."""
        return sum(counts.get("truncated", 0) for counts in self.counts)

    @property
    def bad(self):
        """(rows left out because they are no conversation, why the first was), of the same windows."""
        return sum(counts.get("bad", 0) for counts in self.counts), next(
            (c["first_bad"] for c in self.counts if c.get("bad")), ""
        )

    @property
    def untrained(self):
        """Documents left out because no target is in them, of the same windows."""
        return sum(counts.get("untrained", 0) for counts in self.counts)

    def take(self, count):
        """The next `count` micro-batches as a list: a validation set."""
        return first(self, count)

    def state_dict(self):
        """Each worker's place in the stream, how the stream was split, and which data it is of."""
        split = {"world_size": self.world_size, "workers": len(self.states)}
        return {
            "states": list(self.states),
            "turn": self.turn,
            "epoch": self.epoch,
            "settings": self.settings,
            "data": self.data,
        } | split

    def load_state_dict(self, state):
        """Continue there; ValueError where the stream was split or packed in another way, or is of other data."""
        for name, own, what in (
            ("world_size", self.world_size, "processes"),
            ("workers", len(self.states), "data workers each"),
        ):
            if state[name] != own:
                raise ValueError(
                    f"the checkpoint's stream is split over {state[name]} {what}, this run has {own}; resume with {state[name]}"
                )
        for name, value in self.settings.items():
            if (
                state["settings"].get(name, "error" if name == "bad_rows" else None) != value
            ):  # checkpoints of before have none
                raise ValueError(
                    f"the checkpoint's stream has {name}={state['settings'].get(name)}, this run {value}; resume with the former"
                )
        for theirs, own in zip(state.get("data", self.data), self.data, strict=True):  # checkpoints of before have none
            if theirs != own:
                raise ValueError(
                    f"the checkpoint's stream is of {theirs}, this run's of {own}; resume with the former, or begin anew without --resume"
                )
        self.states, self.turn, self.epoch = list(state["states"]), state["turn"], state["epoch"]


class TextBatches(_Windows):
    """Endless micro-batches of plain text in full rows: best fit from a window; when nothing fits, the shortest document is cut.

    `mode` "crop" drops the rest of a cut document, "keep" puts it back for a later row. `streaming` reads without downloading first.
    Each document goes to one process (and worker) an epoch. ValueError for data without `text_column`, before the first batch.
    """

    def __init__(
        self,
        source,
        tokenizer,
        *,
        rows,
        positions,
        rank=0,
        world_size=1,
        seed=0,
        mode="crop",
        text_column="text",
        isolate=True,
        streaming=False,
        num_workers=0,
        prefetch=2,
    ):
        if mode not in ("crop", "keep"):
            raise ValueError(f"mode={mode!r} must be crop or keep")
        reader = _reader(source, streaming, seed, world_size)
        if isinstance(reader, StreamReader) and _is_lines(source):
            reader.stream = reader.stream.map(JsonText(text_column), remove_columns=["line", "where"])
        check_column(reader.stream if streaming else reader.rows, text_column, source.label)
        pack = PackText(PlainEncoder(tokenizer), positions + 1, mode, text_column, source)
        super().__init__(
            reader,
            pack,
            PackingCollator(positions, tokenizer.pad_token_id, isolate),
            rows=rows,
            rank=rank,
            world_size=world_size,
            seed=seed,
            num_workers=num_workers,
            prefetch=prefetch,
            settings={"positions": positions, "mode": mode, "streaming": streaming},
            data=[identity(source, _rows(reader))],
        )
        self.plain, self.label = reader.stream if streaming else reader.rows, source.label

    def outlook(self, tokens):
        """The share of tokens that cropping drops, from the first documents that hold `tokens` tokens; 0 in mode "keep".

        ValueError where the whole data holds fewer: a step would meet its documents twice.
        """
        pack, rows, waiting = copy.copy(self.stream.pack), iter(self.plain), []
        pack.counts = dict.fromkeys(pack.counts, 0)
        while pack.counts["read"] < tokens:
            window, size = [], 0
            for row in rows:
                window.append(row)
                size += pack.size(row)
                if len(window) >= pack.documents or size >= pack.characters:
                    break
            if not window:
                raise ValueError(
                    f"{self.label}: {pack.counts['read']:,} tokens are fewer than the {tokens:,} of one step; "
                    "give more text or lower --total-batch-size, --device-batch-size or --max-seq-len"
                )
            _, waiting = pack(waiting, window)
        return pack.counts["cropped"] / pack.counts["read"]


class StreamedConversations(_Windows):
    """Endless micro-batches of conversations that are read as a stream: nothing is downloaded or planned first, so there is no number of
    rows and no epoch's end, and each source counts by its weight (or repeat). Sources that are tasks are read whole."""

    def __init__(
        self,
        sources,
        tokenizer,
        *,
        rows,
        positions,
        rank=0,
        world_size=1,
        seed=0,
        train_on_all_tokens=False,
        isolate=True,
        overlong="truncate",
        bad_rows="error",
        num_workers=0,
        prefetch=2,
    ):
        check_policy(bad_rows)
        if overlong not in OVERLONG:
            raise ValueError(f"overlong={overlong!r} is unknown; choose from {', '.join(OVERLONG)}")
        self.treat = _Treat(
            sources, PlainEncoder(tokenizer), positions + 1, overlong, train_on_all_tokens, bad_rows == "skip"
        )
        readers = [_reader(source, not source.task, seed, world_size) for source in sources]
        for number, reader in enumerate(
            readers
        ):  # the first row of each source is rendered now, so that a wrong form shows before training
            rows_, _ = reader.open(rank, world_size, 0, 1)
            self.treat([(number, next(rows_)[0])])
        self.treat.reset()
        super().__init__(
            MixedReader(readers, [source.copies for source in sources]),
            PackConversations(self.treat, positions + 1),
            PackingCollator(positions, tokenizer.pad_token_id, isolate),
            rows=rows,
            rank=rank,
            world_size=world_size,
            seed=seed,
            num_workers=num_workers,
            prefetch=prefetch,
            settings={"positions": positions, "overlong": overlong, "bad_rows": bad_rows, "sources": len(sources)},
            data=[identity(source, _rows(reader)) for source, reader in zip(sources, readers, strict=True)],
        )


class _Treat:
    """(source's number, row) pairs → documents: converted, rendered, and cut by the policy; those without a target are left out."""

    def __init__(self, sources, encoder, capacity, overlong, train_on_all_tokens, skip=False):
        self.sources, self.encoder, self.capacity, self.overlong, self.all = (
            sources,
            encoder,
            capacity,
            overlong,
            train_on_all_tokens,
        )
        self.skip = skip
        self.reset()

    def reset(self):
        """Count from nothing."""
        self.counts = {"truncated": 0, "split": 0, "dropped": 0, "untrained": 0, "bad": 0, "first_bad": ""}
        self.rows = [BadRows() for _ in self.sources]

    def __call__(self, rows):
        kept = [conversation for n, row in rows if (conversation := self._kept(row, n)) is not None]
        if not kept:
            return []
        ids, mask, lengths = self.encoder.render(kept)
        ends, documents = np.cumsum(lengths), []
        for start, end in zip(ends - lengths, ends, strict=True):
            documents += self._pieces(ids[start:end], mask[start:end])
        return documents

    def _kept(self, row, number):
        source, counted = self.sources[number], self.rows[number]
        try:
            conversation = self._conversation(row, source)
            counted.add(None)
            return conversation
        except ValueError as error:
            if not self.skip:
                raise
            counted.add(error)
            self.counts |= {"bad": self.counts["bad"] + 1, "first_bad": self.counts["first_bad"] or str(error)}
            if counted.seen >= ENOUGH:
                counted.check(source.label)

    def _conversation(self, row, source):
        if not source.task and _is_lines(source):
            return to_conversation(parse_line(row["line"], row["where"]), row["where"], source)
        try:
            return to_conversation(row, source.label, source)
        except ConversationError as error:  # searched for only now: a stream does not number its rows
            raise ConversationError(f"{locate(source, row)}{str(error).removeprefix(source.label)}") from None

    def _pieces(self, ids, mask):
        spans = [(0, len(ids))]
        if len(ids) > self.capacity:
            turns = [0, *np.flatnonzero(ids == self.encoder.special["<|user_start|>"])[1:]]
            spans = cut(len(ids), turns, self.capacity, self.overlong)
            self.counts["dropped"] += not spans
            self.counts["split"] += len(spans) > 1
            self.counts["truncated"] += bool(spans) and sum(b - a for a, b in spans) < len(ids)
        for a, b in spans:
            if self.all or mask[a:b].any():
                head = [self.encoder.special["<|bos|>"]] if a else []
                yield {
                    "ids": [*head, *ids[a:b].tolist()],
                    "mask": None if self.all else [*[0] * len(head), *mask[a:b].tolist()],
                }
            else:
                self.counts["untrained"] += 1


def _rows(reader):
    return reader.stream if isinstance(reader, StreamReader) else reader.rows


def _is_lines(source):
    return any(ending in str(source.path) for ending in (".jsonl",))


def _reader(source, streaming, seed, world_size):
    if not streaming:
        return MapReader(task_rows(source) if source.task else load_source(source, check=False), source.label, seed)
    stream = load_stream(source)
    if stream.num_shards % world_size:
        print(
            f"{source.label}: {stream.num_shards} shards do not divide by {world_size} processes, so each reads all of them and takes its share",
            flush=True,
        )
    return StreamReader(stream, source, seed)
