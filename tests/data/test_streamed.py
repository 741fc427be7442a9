"""Streams: each document once an epoch over ranks and workers, and exact resume with workers.

Also what is said of streams that cannot be.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_hf.data.loading import load_shards, load_source
from nanochat_hf.data.packing import pack_text
from nanochat_hf.data.readers import Consumer, MapReader, StreamReader
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.data.streamed import StreamedConversations, TextBatches
from nanochat_hf.tokenizer import train_tokenizer

DOCUMENTS = 61


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["ab"], 265)  # a token per byte: documents can be read off the batches


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """61 documents "<number>" of 3 to 40 bytes in 4 parquet files of unequal length."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("shards")
    for shard, (first, stop) in enumerate(((0, 30), (30, 37), (37, 60), (60, 61))):
        texts = [f"<{n}>" + "x" * (n % 38) for n in range(first, stop)]
        Dataset.from_dict({"text": texts, "other": texts}).to_parquet(folder / f"part-{shard}.parquet")
    return str(folder / "part-*.parquet")


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [
        [{"role": "user", "content": f"<{i}>"}, {"role": "assistant", "content": "y" * (i % 23 + 1)}]
        for i in range(DOCUMENTS)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def digest(batch):
    return hashlib.sha256(b"".join(batch[k].numpy().tobytes() for k in sorted(batch))).hexdigest()


def digests(batches, count):
    return [digest(b) for b in batches.take(count)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["map", "stream"])
def test_an_epoch_holds_every_document_once_over_ranks_and_workers(shards, world_size, workers, kind):
    source, seen = SourceConfig(path=shards), []
    for rank in range(world_size):
        for worker in range(workers):
            seen += epoch_of_consumer(source, kind, rank, world_size, worker, workers)
    assert sorted(seen) == sorted(f"<{n}>" + "x" * (n % 38) for n in range(DOCUMENTS))


def epoch_of_consumer(source, kind, rank, world_size, worker, workers):
    """The texts of a consumer's first epoch."""
    reader = (
        MapReader(load_source(source), "x", 0)
        if kind == "map"
        else StreamReader(load_shards(source), source, 0, block=7)
    )
    rows, place = reader.open(Consumer(rank, world_size, worker, workers))
    texts = []
    for row, _ in rows:
        if place()["epoch"]:
            return texts
        texts.append(row.parsed()["text"])


class OneByOne:
    """Packs nothing: a window is one document, and a row too, so that a batch's epoch is its document's."""

    documents, characters = 1, 1

    def __init__(self, encoder):
        self.encoder = encoder

    def read(self, row):
        return row.parsed()["text"], 1

    def __call__(self, waiting, items):
        return [[{"ids": ids}] for ids in self.encoder.encode(items)], []

    def news(self):
        return {"report": []}

    def recall(self, news):
        pass


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loaders_of_all_ranks_deal_every_document_out_once(tokenizer, shards, world_size, workers, streaming):
    seen = []
    for rank in range(world_size):
        batches = TextBatches(
            SourceConfig(path=shards),
            tokenizer,
            rows=1,
            positions=63,
            rank=rank,
            world_size=world_size,
            streaming=streaming,
            num_workers=workers,
        )
        batches.stream.pack = OneByOne(batches.stream.pack.encoder)
        consumers, ended = max(1, workers), set()
        for number, batch in enumerate(batches):
            epoch = batches.epochs[number % consumers]
            if epoch > 1 or (streaming and epoch == 1):
                ended.add(number % consumers)
            else:
                seen.append(re.match(r"<\d+>x*", tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True))[0])
            if len(ended) == consumers:
                break
    assert sorted(seen) == sorted(f"<{n}>" + "x" * (n % 38) for n in range(DOCUMENTS))


@pytest.mark.parametrize(
    ("streaming", "workers", "rank", "world_size"),
    [
        (True, 0, 0, 1),
        (True, 1, 0, 1),
        (True, 2, 0, 1),
        (True, 0, 1, 3),
        (True, 2, 1, 2),
        (False, 2, 1, 2),
        (False, 0, 2, 3),
    ],
)
@pytest.mark.parametrize("mode", ["crop", "keep"])
def test_a_resumed_stream_of_text_equals_the_uninterrupted_one(
    tokenizer, shards, streaming, workers, rank, world_size, mode
):
    def make():
        batches = TextBatches(
            SourceConfig(path=shards),
            tokenizer,
            rows=2,
            positions=47,
            rank=rank,
            world_size=world_size,
            mode=mode,
            streaming=streaming,
            num_workers=workers,
        )
        batches.stream.pack.documents = 9  # several windows, blocks and epochs within the test
        if streaming:
            batches.stream.reader.block = 5
        return batches

    uninterrupted = make()
    whole = digests(uninterrupted, 24)
    assert len(set(whole)) == 24
    for stop in (1, 7, 16):
        first, second = make(), make()
        assert digests(first, stop) == whole[:stop]
        second.load_state_dict(json_like(first.state_dict()))
        assert shown(second) == shown(first)
        assert digests(second, 24 - stop) == whole[stop:] and shown(second) == shown(uninterrupted)


def shown(batches):
    """What a run shows of its data: passes, and what became of the rows."""
    return batches.epoch, batches.report.state()


def json_like(state):
    """The state as a checkpoint gives it back: written and read."""
    import io

    import torch

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_streamed_conversations_equal_uninterrupted_ones(tokenizer, chats, workers, tmp_path):
    def make(**changes):
        sources = [SourceConfig(path=chats), SourceConfig(path=chats, rows=10, weight=0.5)]
        sources.append(SourceConfig(path=bad))
        batches = StreamedConversations(
            sources, tokenizer, rows=2, positions=63, num_workers=workers, bad_rows="skip", **changes
        )
        batches.stream.pack.documents = 11
        return batches

    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    bad = str(tmp_path / "some_bad.jsonl")
    Path(bad).write_text("".join(json.dumps(row) + "\n" for row in [good, good, None] * 4))
    uninterrupted, first, second = make(), make(), make()
    whole = digests(uninterrupted, 20)
    assert digests(first, 9) == whole[:9]
    second.load_state_dict(json_like(first.state_dict()))
    assert shown(second) == shown(first)
    assert digests(second, 11) == whole[9:] and shown(second) == shown(uninterrupted)
    assert second.bad[0] > first.bad[0] > 0
    assert digests(make(seed=1), 3) != whole[:3]


def test_streamed_conversations_come_equally_often_and_whole(tokenizer, chats):
    batches, asked = StreamedConversations([SourceConfig(path=chats)], tokenizer, rows=1, positions=63), []
    batches.stream.pack.documents = 16
    for batch in batches.take(150):
        assert batch["input_ids"][0, 0] == tokenizer.bos_token_id and (batch["shift_labels"] != -100).any()
        said = re.findall(
            r"<(\d+)><\|user_end\|><\|assistant_start\|>(y*)<\|assistant_end\|>",
            tokenizer.decode(batch["input_ids"][0]),
        )
        assert all(len(answer) == int(n) % 23 + 1 for n, answer in said)
        asked += [int(n) for n in re.findall(r"<(\d+)>", tokenizer.decode(batch["input_ids"][0]))]
    counts = [asked.count(n) for n in range(DOCUMENTS)]
    assert max(counts) - min(counts) <= 2  # the epoch that runs, and what waits for a fuller row


@pytest.mark.parametrize(("policy", "counted"), [("truncate", "truncated"), ("drop", "untrained")])
def test_a_stream_counts_what_it_cuts_also_in_workers(tokenizer, tmp_path, policy, counted):
    rows = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * 100}]]
    rows += [[{"role": "user", "content": "q" * 5}]] * 3 + [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    ] * 20
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for workers in (0, 1):
        batches = StreamedConversations(
            [SourceConfig(path=str(tmp_path / "long.jsonl"))],
            tokenizer,
            rows=1,
            positions=31,
            overlong=policy,
            num_workers=workers,
        )
        batches.take(3)
        assert getattr(batches, counted) >= 1
        assert batches.untrained >= 3


def test_another_split_of_the_stream_is_refused(tokenizer, shards):
    def make(**changes):
        return TextBatches(
            SourceConfig(path=shards), tokenizer, **({"rows": 1, "positions": 31, "streaming": True} | changes)
        )

    state = make(world_size=2).state_dict()
    with pytest.raises(ValueError, match="split over 2 processes, this run has 3; resume with 2"):
        make(world_size=3).load_state_dict(state)
    with pytest.raises(ValueError, match="split over 1 data workers each, this run has 2; resume with 1"):
        make(world_size=2, num_workers=2).load_state_dict(state)
    with pytest.raises(ValueError, match="positions=31, this run 47"):
        make(world_size=2, positions=47).load_state_dict(state)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_stream_of_other_data_is_refused_and_the_same_in_another_folder_is_not(
    tokenizer, shards, tmp_path, streaming
):
    def make(folder, **changes):
        source = SourceConfig(path=str(folder / "part-*.parquet"), **changes)
        return TextBatches(source, tokenizer, rows=1, positions=31, streaming=streaming)

    first = make(Path(shards).parent)
    first.take(2)
    shutil.copytree(Path(shards).parent, tmp_path / "moved")
    make(tmp_path / "moved").load_state_dict(json_like(first.state_dict()))
    with pytest.raises(
        ValueError,
        match=r"is of part-0.parquet to part-3.parquet \(4 files, .*, this run's of .*rows from 3; "
        r"resume with the former",
    ):
        make(tmp_path / "moved", start=3).load_state_dict(first.state_dict())
    (tmp_path / "moved" / "part-1.parquet").unlink()
    with pytest.raises(ValueError, match=r"this run's of part-0.parquet to part-3.parquet \(3 files"):
        make(tmp_path / "moved").load_state_dict(first.state_dict())
    older = {name: value for name, value in first.state_dict().items() if name != "data"}
    make(Path(shards).parent).load_state_dict(older)


def test_streamed_conversations_of_another_file_are_refused(tokenizer, chats, tmp_path):
    def make(path):
        return StreamedConversations(
            [SourceConfig(path=chats), SourceConfig(path=str(path))], tokenizer, rows=1, positions=63
        )

    lines = Path(chats).read_text().splitlines(keepends=True)
    (tmp_path / "less.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(
        ValueError, match=r"stream is of chats.jsonl \([\d,]+ bytes\), this run's of less.jsonl \([\d,]+ bytes\)"
    ):
        make(tmp_path / "less.jsonl").load_state_dict(make(chats).state_dict())


@pytest.mark.parametrize("streaming", [True, False])
def test_wrong_columns_and_missing_text_are_said_before_training(tokenizer, shards, tmp_path, streaming):
    with pytest.raises(ValueError, match="no column 'body'; it has text, other"):
        TextBatches(SourceConfig(path=shards), tokenizer, rows=1, positions=31, text_column="body", streaming=streaming)
    (tmp_path / "t.jsonl").write_text('{"a": "x"}\n')
    with pytest.raises(ValueError, match="no column 'text'; it has a"):
        TextBatches(SourceConfig(path=str(tmp_path / "t.jsonl")), tokenizer, rows=1, positions=31, streaming=streaming)
    with pytest.raises(ValueError, match="none.parquet: no such file"):
        TextBatches(SourceConfig(path="none.parquet"), tokenizer, rows=1, positions=31, streaming=streaming)


@pytest.mark.parametrize("world_size, workers", [(1, 4), (2, 2), (3, 4), (4, 1)])
def test_no_more_workers_than_a_process_has_shards(tmp_path, tokenizer, world_size, workers):
    from datasets import Dataset

    for shard in range(4):
        Dataset.from_dict({"text": [f"row {i} of {shard}" for i in range(8)]}).to_parquet(
            str(tmp_path / f"{shard}.parquet")
        )
    source = SourceConfig(path=str(tmp_path / "*.parquet"))
    batches = TextBatches(source, tokenizer, rows=1, positions=16, world_size=world_size, streaming=True, num_workers=8)
    assert batches.num_workers == workers and len(batches.take(5)) == 5


def test_too_few_documents_for_the_processes(tokenizer, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "x"}\n')
    batches = TextBatches(
        SourceConfig(path=str(tmp_path / "t.jsonl")), tokenizer, rows=1, positions=31, rank=1, world_size=2
    )
    with pytest.raises(ValueError, match="1 documents cannot be dealt to 2 consumers"):
        batches.take(1)
    batches = TextBatches(
        SourceConfig(path=str(tmp_path / "t.jsonl")),
        tokenizer,
        rows=1,
        positions=31,
        rank=1,
        world_size=2,
        streaming=True,
    )
    with pytest.raises(ValueError, match="no document for process 1"):
        batches.take(1)


def test_the_epoch_of_a_stream_is_shuffled_anew(shards):
    source = SourceConfig(path=shards)
    rows, _ = StreamReader(load_shards(source), source, 0, block=10).open(Consumer(0, 1, 0, 1))
    epochs = [[next(rows)[0].parsed()["text"] for _ in range(DOCUMENTS)] for _ in range(3)]
    assert all(sorted(e) == sorted(epochs[0]) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 12))
def test_keep_loses_no_token_and_crop_fills_every_row(lengths, capacity):
    documents = [
        [0, *range(100 * i + 1, 100 * i + n + 1)] for i, n in enumerate(lengths)
    ]  # every token but bos is unique
    if capacity > 1:  # with one place a row nothing but bos would ever fit
        rows, rest = pack_text(documents, capacity, "keep", 0)
        kept = [t for row in [*rows, rest] for piece in row for t in piece if t]
        assert sorted(kept) == sorted(t for d in documents for t in d if t)
        assert all(sum(map(len, row)) == capacity and all(piece[0] == 0 for piece in row) for row in rows)
    rows, rest = pack_text(documents, capacity, "crop", 0)
    assert all(sum(map(len, row)) == capacity for row in rows) and sum(map(len, rest)) < capacity
    firsts = [piece[1] for row in rows for piece in row if len(piece) > 1]
    assert len(set(firsts)) == len(firsts)  # what crop cuts off does not come again


def test_pack_text_as_documented():
    assert pack_text([[0, 1, 2], [0, 3, 4, 5]], 5, "keep", 0) == ([[[0, 3, 4, 5], [0]]], [[0, 1, 2]])
