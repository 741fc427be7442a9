"""--bad-rows skip: rows that are no conversation are left out and counted, planned or streamed.

More than half of them is an error.
"""

import json

import pytest

from nanochat_hf.data.planned import SFTBatches
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.data.streamed import StreamedConversations
from nanochat_hf.tokenizer import train_tokenizer
from tests.support.training import train

BAD = ['{"messages": [', '[{"role": "assistant", "content": "x"}]', '{"prompt": "x"}', "7"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["ab"], 265)


def chats(path, good, bad, first=0):
    """`good` conversations with `bad` bad rows behind the first `first` of them."""
    lines = [
        json.dumps([{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}])
        for i in range(good)
    ]
    path.write_text("".join(f"{line}\n" for line in [*lines[:first], *(BAD * bad)[:bad], *lines[first:]]))
    return [SourceConfig(path=str(path))]


@pytest.mark.parametrize("first", [0, 5])
def test_planned_bad_rows_are_left_out_and_counted_and_both_settings_keep_apart(tokenizer, tmp_path, first):
    sources, shape = chats(tmp_path / "c.jsonl", 20, 4, first), dict(rows=2, positions=63)
    batches = SFTBatches(sources, tokenizer, **shape, bad_rows="skip")
    count, reason = batches.bad
    assert (
        count == 4
        and len(batches.documents) == 20
        and reason.startswith(f"{tmp_path}/c.jsonl line {first + 1}: not JSON")
    )
    assert f"4 bad rows left out (the first: {reason})" in str(batches.reports[0]) and batches.untrained == 0
    with pytest.raises(
        ValueError, match=f"c.jsonl line {first + 1}: not JSON"
    ):  # also behind the cache of the other setting
        SFTBatches(sources, tokenizer, **shape)
    alone = SFTBatches(chats(tmp_path / "good.jsonl", 20, 0), tokenizer, **shape, seed=0)
    ours, theirs = ([{k: v.tolist() for k, v in b.items()} for b in made.take(4)] for made in (batches, alone))
    assert ours == theirs


@pytest.mark.parametrize("kind", [SFTBatches, StreamedConversations])
def test_more_than_half_bad_is_an_error_and_so_is_another_word(tokenizer, tmp_path, kind):
    with pytest.raises(ValueError, match=r"c.jsonl: [\d,]+ of [\d,]+ rows are bad, more than half; .*c.jsonl line "):
        kind(chats(tmp_path / "c.jsonl", 90, 120), tokenizer, rows=1, positions=31, bad_rows="skip").take(10)
    with pytest.raises(ValueError, match="--bad-rows drop is unknown; choose from error, skip"):
        kind(chats(tmp_path / "d.jsonl", 9, 0), tokenizer, rows=1, positions=31, bad_rows="drop")


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_bad_rows_are_left_out_and_counted(tokenizer, tmp_path, workers):
    sources = chats(tmp_path / "c.jsonl", 150, 4, 50)
    batches = StreamedConversations(sources, tokenizer, rows=1, positions=31, num_workers=workers, bad_rows="skip")
    batches.take(100)
    count, reason = batches.bad
    assert count >= 4 and "c.jsonl line 5" in reason
    with pytest.raises(ValueError, match="has bad_rows=skip, this run error"):
        StreamedConversations(sources, tokenizer, rows=1, positions=31, num_workers=workers).load_state_dict(
            batches.state_dict()
        )


@pytest.mark.parametrize("streaming", [False, True])
def test_the_script_says_how_many_and_why(start, tmp_path, streaming):
    chats(tmp_path / "c.jsonl", 60, 4, 3)
    run = train(
        start,
        tmp_path / "run",
        tmp_path / "log",
        data=tmp_path / "c.jsonl",
        bad_rows="skip",
        streaming=streaming,
        num_steps=2,
    )
    assert run.wait() == [0], run.text()
    assert streaming or "4 bad rows left out (the first: " in run.text()
    report = (tmp_path / "run" / "report.md").read_text()
    assert "bad rows left out" in report and "c.jsonl line" in report
