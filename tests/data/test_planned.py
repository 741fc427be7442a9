"""Planned fine-tuning data: cached tokens, policies, exact resume on any number of processes, errors in one line."""

import gzip
import hashlib
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat_hf.conversation import PlainEncoder, render
from nanochat_hf.data.collate import PackingCollator
from nanochat_hf.data.conversations import conversations
from nanochat_hf.data.loading import load_source
from nanochat_hf.data.overlong import cut
from nanochat_hf.data.planned import SFTBatches
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.data.tokenising import tokenise
from nanochat_hf.data.workers import ahead
from nanochat_hf.tokenizer import train_tokenizer

REAL = Path(__file__).parents[3] / "shared" / "data" / "conversations" / "train.parquet"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["ab"], 265)  # a token per byte: lengths can be read off


def ask(question, *answers):
    messages = []
    for i, answer in enumerate(answers):
        messages += [{"role": "user", "content": f"{question}{i}"}, {"role": "assistant", "content": answer}]
    return messages


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def chats(tmp_path):
    return write(tmp_path / "chats.jsonl", [ask(f"<{i}>", "y" * (i % 19 + 1)) for i in range(57)])


def make(sources, tokenizer, **changes):
    sources = [SourceConfig(path=sources)] if isinstance(sources, str) else sources
    return SFTBatches(sources, tokenizer, **({"rows": 2, "positions": 63} | changes))


def test_tokenised_rows_equal_render_and_come_from_the_cache_the_second_time(tokenizer, chats, cache, monkeypatch):
    source = SourceConfig(path=chats)
    batches = make(chats, tokenizer)
    for document, converted in zip(batches.documents, conversations(source), strict=True):
        ids, mask = render(tokenizer, converted.conversation)
        assert document["ids"].tolist() == ids and document["mask"].tolist() == mask
    files = sorted(cache.glob("nanochat_hf/*.arrow"))
    assert len(files) == 1
    monkeypatch.setattr(PlainEncoder, "render", lambda *_: pytest.fail("rendered again"))
    assert make(chats, tokenizer).documents.digest == batches.documents.digest
    monkeypatch.undo()


def test_another_tokenizer_template_or_content_is_another_cache(tokenizer, chats, monkeypatch):
    import nanochat_hf.conversation as module

    first = PlainEncoder(tokenizer).fingerprint
    assert PlainEncoder(tokenizer).fingerprint == first
    assert PlainEncoder(train_tokenizer(["abab abab"], 266)).fingerprint != first
    monkeypatch.setattr(module, "CHAT_TEMPLATE", module.CHAT_TEMPLATE + " ")
    assert PlainEncoder(tokenizer).fingerprint != first
    before = tokenise(SourceConfig(path=chats), PlainEncoder(tokenizer))[0]._fingerprint
    Path(chats).write_text(Path(chats).read_text().replace("<5>", "<6>"))
    assert tokenise(SourceConfig(path=chats), PlainEncoder(tokenizer))[0]._fingerprint != before


def test_several_processes_tokenise_the_same_and_survive_pickling(tokenizer, chats):
    import pickle

    one = [d["ids"].tolist() for d in make(chats, tokenizer).documents]
    import datasets

    datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE / "other"
    batches = make(chats, tokenizer, num_proc=2)
    assert [d["ids"].tolist() for d in batches.documents] == one
    assert [d["ids"].tolist() for d in pickle.loads(pickle.dumps(batches.documents))] == one


@pytest.mark.parametrize(("policy", "spans"), [("truncate", [(0, 7)]), ("split", [(0, 7), (7, 10)]), ("drop", [])])
def test_cut_as_documented(policy, spans):
    assert cut(10, [0, 4, 7], 7, policy) == spans


def test_cut_keeps_everything_where_each_turn_fits_and_never_exceeds_the_row():
    rng = np.random.default_rng(0)
    for _ in range(300):
        turns = np.concatenate(([0], np.cumsum(rng.integers(1, 9, rng.integers(1, 8)))))
        length, capacity = int(turns[-1]), int(rng.integers(4, 20))
        spans = cut(length, turns[:-1].tolist(), capacity, "split") if length > capacity else [(0, length)]
        assert all(b - a + (a > 0) <= capacity for a, b in spans)
        assert {a for a, _ in spans} <= set(turns.tolist())
        if np.diff(turns).max() < capacity:
            assert [a for a, _ in spans[1:]] == [b for _, b in spans[:-1]] and spans[-1][1] == length


@pytest.mark.parametrize(
    ("policy", "documents", "counts"),
    [("truncate", 4, (2, 0, 0, 1)), ("split", 6, (1, 1, 0, 1)), ("drop", 2, (0, 0, 2, 1))],
)
def test_nothing_is_dropped_silently(tokenizer, tmp_path, policy, documents, counts, capsys):
    # whole, without a target, three turns of 30 tokens each, one turn of 90 tokens
    rows = [
        ask("q", "a"),
        [{"role": "user", "content": "q"}],
        ask("q" * 6, "a" * 20, "b" * 20, "c" * 20),
        ask("q", "a" * 84),
        ask("q", "b"),
    ]
    path = write(tmp_path / "long.jsonl", rows)
    batches = make(path, tokenizer, positions=39, overlong=policy, progress=True)
    report = batches.reports[0]
    assert (report.truncated, report.split, report.dropped, report.untrained) == counts
    assert len(batches.documents) == documents
    printed = capsys.readouterr().out
    assert "read as lists of messages" in printed and "1 without a target left out" in printed
    for number, word in zip(counts, ("truncated", "split", "dropped as too long"), strict=False):
        assert (f"{number} {word}" in printed) == bool(number)
    for document in batches.documents:
        assert document["ids"][0] == tokenizer.bos_token_id and len(document["ids"]) <= 40 and document["mask"].any()
        assert len(document["ids"]) == len(document["mask"]) and document["mask"][0] == 0


def test_an_answer_cut_away_leaves_no_row_without_target_unless_all_is_trained(tokenizer, tmp_path):
    path = write(tmp_path / "t.jsonl", [ask("q" * 90, "a"), ask("q", "a")])
    assert len(make(path, tokenizer, positions=31).documents) == 1
    everything = make(path, tokenizer, positions=31, train_on_all_tokens=True)
    assert len(everything.documents) == 2 and everything.documents[0]["mask"] is None


def test_weights_repetitions_and_ranges(tokenizer, chats):
    def count(**changes):
        return len(make([SourceConfig(path=chats, **changes)], tokenizer).documents)

    assert [
        count(repeat=2),
        count(weight=0.5),
        count(weight=1.5),
        count(start=50, rows=20),
        count(rows=3, repeat=3),
    ] == [114, 28, 85, 7, 9]
    half = make([SourceConfig(path=chats, weight=0.5)], tokenizer).documents
    assert half.digest == make([SourceConfig(path=chats, weight=0.5)], tokenizer).documents.digest
    assert half.digest != make([SourceConfig(path=chats, weight=0.5)], tokenizer, seed=1).documents.digest


def test_local_formats_and_columns_give_the_same_documents(tokenizer, tmp_path):
    from datasets import Dataset

    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5)]
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "d.jsonl").write_text(lines.replace("\n", "\n\n"))  # blank lines are no rows
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "d.json").write_text(lines)
    data = Dataset.from_list(rows)
    data.to_parquet(tmp_path / "d.parquet")
    data.to_csv(tmp_path / "d.csv")
    data.save_to_disk(tmp_path / "saved")
    for part, (a, b) in enumerate(((0, 2), (2, 5))):
        (tmp_path / f"part-{part}.jsonl").write_text("".join(lines.splitlines(True)[a:b]))
    found = {}
    for name in ("d.jsonl", "d.jsonl.gz", "d.json", "d.parquet", "d.csv", "saved", "part-*.jsonl", "saved/*.arrow"):
        source = SourceConfig(path=str(tmp_path / name), columns={"prompt": "question", "completion": "answer"})
        found[name] = [d["ids"].tolist() for d in make([source], tokenizer).documents]
    assert len(found["d.jsonl"]) == 5 and all(value == found["d.jsonl"] for value in found.values())


def hashes(batches, count):
    return [
        hashlib.sha256(b["input_ids"].numpy().tobytes() + b["shift_labels"].numpy().tobytes()).hexdigest()
        for b in islice(iter(batches), count)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_equals_uninterrupted_with_batches_made_ahead(tokenizer, chats, workers):
    whole = hashes(make(chats, tokenizer, num_workers=workers), 30)
    assert whole == hashes(make(chats, tokenizer, prefetch=0), 30)
    first, second = make(chats, tokenizer, num_workers=workers), make(chats, tokenizer, num_workers=workers)
    stream = iter(first)
    for _ in range(11):
        next(stream)
    second.load_state_dict(first.state_dict())
    assert hashes(second, 19) == whole[11:]


@pytest.mark.parametrize("others", [1, 2, 3])
def test_an_epoch_begun_by_two_processes_ends_on_another_number(tokenizer, chats, others):
    def rows(batches, count):
        return [tuple(row.tolist()) for batch in islice(iter(batches), count) for row in batch["input_ids"]]

    pair = [make(chats, tokenizer, rank=r, world_size=2, rows=1) for r in range(2)]
    begun = [row for batches in pair for row in rows(batches, 4)]
    state, total = pair[0].state_dict(), pair[0].num_rows
    assert state == pair[1].state_dict()
    after = [make(chats, tokenizer, rank=r, world_size=others, rows=1) for r in range(others)]
    for batches in after:
        batches.load_state_dict(state)
    steps = -(-(total - 8) // others)
    by_step = [rows(batches, steps) for batches in after]
    ended = [row for step in zip(*by_step, strict=True) for row in step][: total - 8]
    planned = [
        tuple(row.tolist())
        for batch in islice(iter(make(chats, tokenizer, rows=1)), total)
        for row in batch["input_ids"]
    ]
    assert sorted(begun + ended) == sorted(planned) and len(set(planned)) == total


def test_other_data_another_seed_or_length_do_not_resume(tokenizer, chats, tmp_path):
    state = make(chats, tokenizer).state_dict()
    with pytest.raises(ValueError, match="this run's .*; resume with the same recipe"):
        make(chats, tokenizer, positions=127).load_state_dict(state)
    with pytest.raises(ValueError, match="shuffled by seed 0, this run's by 1"):
        make(chats, tokenizer, seed=1).load_state_dict(state)
    other = make(write(tmp_path / "o.jsonl", [ask(f"<{i}>", "z" * (18 - i % 19 + 1)) for i in range(57)]), tokenizer)
    with pytest.raises(ValueError, match="resume with the same recipe"):
        other.load_state_dict(state | {"num_rows": other.num_rows})


def test_positions_restart_padding_is_alone_and_the_leak_can_be_had():
    rows = [[{"ids": np.array([1, 2, 3]), "mask": None}, {"ids": np.array([1, 4]), "mask": np.array([0, 1])}]]
    batch = PackingCollator(7, 9)(rows)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch["shift_labels"].tolist() == [[2, 3, -100, 4, -100, -100, -100]]
    assert PackingCollator(7, 9, isolate=False)(rows)["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert all(v.shape == (1, 7) and v.dtype == torch.long and v.is_contiguous() for v in batch.values())
    with pytest.raises(ValueError, match="row 0 holds 5 tokens, more than positions . 1 = 4"):
        PackingCollator(3, 9)(rows)


def test_what_is_made_ahead_keeps_order_errors_and_ends():
    import threading

    def failing():
        yield from range(5)
        raise ValueError("broken row")

    before, seen = threading.active_count(), []
    with pytest.raises(ValueError, match="broken row"):
        for item in ahead(failing()):
            seen.append(item)
    assert seen == list(range(5)) and list(ahead(iter([1, 2]))) == [1, 2]
    endless = ahead(iter(int, 1))
    next(endless)
    endless.close()
    assert threading.active_count() == before


@pytest.mark.skipif(not REAL.is_file(), reason="the real conversations are not at hand (../shared/data)")
def test_real_conversations_leave_little_padding(tokenizer):
    texts = (m["content"] for row in load_source(SourceConfig(path=str(REAL), rows=800)) for m in row["messages"])
    tokenizer = train_tokenizer(texts, 2048)
    for positions, most in (
        (512, 0.0015),
        (1024, 0.0010),
        (2048, 0.0010),
    ):  # tokenised by the first, read from the cache by the others
        batches = make(str(REAL), tokenizer, positions=positions)
        assert batches.padding_share <= most, (positions, batches.padding_share)
        assert len(batches.documents) + batches.untrained == 25_273


@pytest.mark.parametrize("rows, count, batches", [(4, 8, 3), (4, 2, 2), (5, 8, 2), (16, 1, 1)])
def test_no_row_of_a_validation_set_counts_twice(tokenizer, tmp_path, rows, count, batches):
    lines = [
        [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"answer {i} " * 4}] for i in range(10)
    ]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = SFTBatches([SourceConfig(path=str(tmp_path / "v.jsonl"))], tokenizer, rows=rows, positions=60, prefetch=0)
    assert data.num_rows == 10
    made = data.once(count)
    assert [len(batch["input_ids"]) for batch in made] == [rows] * batches
    counted = [
        row.tolist()
        for batch in made
        for row, labels in zip(batch["input_ids"], batch["shift_labels"], strict=True)
        if (labels >= 0).any()
    ]
    assert len(counted) == len({tuple(row) for row in counted}) == min(10, rows * batches)
