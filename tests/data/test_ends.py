"""Data that gives nothing ends with an error, also for a user who stops early; the cache key holds what makes rows."""

import json
import threading
import time

import pytest

import nanochat_hf.tasks
from nanochat_hf.data.code_key import code_key
from nanochat_hf.data.planned import SFTBatches
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.data.streamed import StreamedConversations, TextBatches
from nanochat_hf.data.workers import ahead, check_stopped
from nanochat_hf.tasks.base import Task, pair, same_text
from nanochat_hf.tokenizer import train_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["ab"], 265)


@pytest.mark.parametrize("kind", [SFTBatches, StreamedConversations])
@pytest.mark.parametrize(
    ("policy", "reason"), [("drop", "0 without a target, [0-9,]+ dropped"), ("truncate", "[0-9,]+ without a target")]
)
def test_conversations_without_a_target_end_planned_or_streamed(tokenizer, tmp_path, kind, policy, reason):
    row = [{"role": "user", "content": "word " * 50}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "long.jsonl").write_text((json.dumps(row) + "\n") * 30)
    source = SourceConfig(path=str(tmp_path / "long.jsonl"))
    with pytest.raises(
        ValueError, match=f"no conversation has an assistant turn that fits the row of 63 positions.*{reason}"
    ):
        kind([source], tokenizer, rows=1, positions=63, overlong=policy).take(1)


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_texts_end(tokenizer, tmp_path, streaming):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 50)
    batches = TextBatches(
        SourceConfig(path=str(tmp_path / "empty.jsonl")), tokenizer, rows=1, positions=31, streaming=streaming
    )
    for look in (lambda: batches.take(1), lambda: batches.once(1), lambda: batches.outlook(100)):
        with pytest.raises(ValueError, match="empty.jsonl: no text in 'text', all is empty"):
            look()


@pytest.mark.parametrize("streaming", [False, True])
def test_files_without_rows_end(tokenizer, tmp_path, streaming):
    (tmp_path / "none.jsonl").write_text("\n")
    source = SourceConfig(path=str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="none.jsonl: no rows"):
        TextBatches(source, tokenizer, rows=1, positions=31, streaming=streaming)
    with pytest.raises(ValueError, match="none.jsonl: no rows"):
        (StreamedConversations if streaming else SFTBatches)([source], tokenizer, rows=1, positions=31)


def test_a_thread_that_makes_nothing_stops_when_it_is_told():
    def spinning():
        yield 1
        while True:  # as a source whose rows are all left out
            check_stopped()
            time.sleep(0.001)

    before = threading.active_count()
    items = ahead(spinning())
    assert next(items) == 1
    start = time.monotonic()
    items.close()
    assert time.monotonic() - start < 5 and threading.active_count() == before


def load(split="train", path=None, limit=None):
    return [{"q": f"question {i}", "a": f"answer {i}"} for i in range(limit or 3)]


def greeting():
    return "Hello"


def polite(row):
    return pair(f"{greeting()}: {row['q']}", row["a"])


def test_an_edited_task_is_tokenised_anew(tokenizer, monkeypatch):
    def first(to_conversation):
        monkeypatch.setitem(nanochat_hf.tasks.TASKS, "mine", Task("mine", load, to_conversation, same_text))
        batches = SFTBatches([SourceConfig(task="mine", rows=3)], tokenizer, rows=1, positions=64)
        return tokenizer.decode(batches.documents[0]["ids"])

    assert "answer 0" in first(lambda row: pair(row["q"], row["a"]))
    assert "Fixed answer 0" in first(lambda row: pair(row["q"], "Fixed " + row["a"]))
    assert "Hello: question 0" in first(polite)
    monkeypatch.setitem(globals(), "greeting", lambda: "Good day")  # a function that the task uses
    assert "Good day: question 0" in first(polite)


def test_the_key_of_code_changes_with_what_it_does_alone():
    def make(text, extra=0):
        scope = {"WORD": "a", "helper": lambda x: x + extra}
        exec(text, scope)
        return scope["f"]

    same = "def f(x):\n    return helper(x) + WORD"
    key = code_key([make(same)])
    assert code_key([make("\n\n# moved\n" + same)]) == key
    for other in (
        make(same.replace("+ WORD", "- WORD")),
        make(same, extra=1),
        make(same.replace("helper(x)", "helper(x * 2)")),
    ):
        assert code_key([other]) != key
