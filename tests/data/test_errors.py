"""What is wrong with data or with a recipe's entry is said in one line, with file and row, before training."""

import pytest

from nanochat_hf.data.loading import load_source
from nanochat_hf.data.planned import SFTBatches
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.data.streamed import StreamedConversations, TextBatches
from nanochat_hf.tokenizer import train_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["ab"], 265)


@pytest.mark.parametrize(
    ("name", "content", "source", "reason"),
    [
        ("a.jsonl", b'[]\n{"a": \n', {}, "a.jsonl line 1: no messages|a.jsonl line 2: not JSON"),
        ("a.jsonl", b"", {}, "a.jsonl: no rows from 0 on in split 'train', which has 0"),
        ("a.jsonl", b'{"prompt": "x"}\n', {}, "a.jsonl line 1: columns prompt; need messages"),
        (
            "a.jsonl",
            b'{"prompt": "x"}\n',
            {"converter": "alpaca"},
            "a.jsonl line 1: no column instruction for the form alpaca; it has prompt",
        ),
        ("a.json", b'{"prompt": "x"\n', {}, "a.json: not JSON, Expecting .*line 2"),
        ("a.csv", b"x,y\n1,2\n", {"columns": {"prompt": "q"}}, "a.csv line 2: no column 'q'; it has x, y"),
        ("a.csv", b"x,y\n1,2\n", {}, "columns x, y; need messages"),
        ("a.parquet", b"PAR1 and no more", {}, "a.parquet: no parquet file"),
        ("a.jsonl.gz", b"no gzip", {}, "a.jsonl.gz: cannot be read"),
        (
            "a.jsonl",
            b'[{"role": "user", "content": "q"}]\n',
            {},
            "no conversation has an assistant turn .*1 without a target",
        ),
        ("a.jsonl", b"[1]\n", {"start": 3}, "no rows from 3 on in split 'train', which has 1"),
        ("saved", None, {"split": "test"}, "no split 'test', it has train"),
    ],
)
def test_what_is_wrong_with_the_data_is_one_line_before_training(tokenizer, tmp_path, name, content, source, reason):
    path = tmp_path / name
    if content is None:
        from datasets import Dataset, DatasetDict

        DatasetDict(train=Dataset.from_dict({"x": [1]})).save_to_disk(path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        SFTBatches([SourceConfig(path=str(path), **source)], tokenizer, rows=2, positions=63)
    assert "\n" not in str(caught.value)


@pytest.fixture
def damaged(tmp_path):
    """Two shards of text, rows 101 to 200 of the second unreadable."""
    import pyarrow as pa
    from pyarrow import parquet

    for name in ("a", "b"):
        parquet.write_table(
            pa.table({"text": [f"{i} {name} " * 50 for i in range(300)]}),
            tmp_path / f"{name}.parquet",
            row_group_size=100,
        )
    damaged = bytearray((tmp_path / "b.parquet").read_bytes())
    place = parquet.ParquetFile(tmp_path / "b.parquet").metadata.row_group(1).column(0).data_page_offset
    damaged[place : place + 40] = b"\xff" * 40
    (tmp_path / "b.parquet").write_bytes(damaged)
    return SourceConfig(path=str(tmp_path / "*.parquet"))


def test_a_corrupt_shard_is_named_with_its_rows(damaged):
    with pytest.raises(ValueError, match=r"b\.parquet: rows 101 to 200 are corrupt"):
        load_source(damaged)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_breaks_off_in_a_stream_is_named_with_its_rows(tokenizer, damaged, workers):
    batches = TextBatches(damaged, tokenizer, rows=2, positions=255, streaming=True, num_workers=workers)
    with pytest.raises(ValueError, match=r"b\.parquet: rows 101 to 200 are corrupt") as caught:
        batches.take(1000)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_shard_without_its_end_is_named_before_the_stream_starts(tokenizer, damaged, tmp_path):
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-30])
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(ValueError, match=r"c\.parquet: no parquet file"):
        TextBatches(damaged, tokenizer, rows=2, positions=255, streaming=True)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"messages": [', "line 41: not JSON"),
        ('[{"role": "assistant", "content": "x"}]', "line 41: turn 1 has role 'assistant'"),
        ('{"prompt": "x"}', "line 41: columns prompt; need messages"),
    ],
)
def test_a_bad_line_in_the_middle_of_a_stream_is_named(tokenizer, tmp_path, bad, reason, workers):
    good = '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'
    (tmp_path / "c.jsonl").write_text("".join(f"{line}\n" for line in [*[good] * 40, bad, *[good] * 40]))
    batches = StreamedConversations(
        [SourceConfig(path=str(tmp_path / "c.jsonl"))], tokenizer, rows=1, positions=31, num_workers=workers
    )
    with pytest.raises(ValueError, match=f"c.jsonl {reason}") as caught:
        batches.take(100)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_bad_row_in_the_middle_of_streamed_parquet_is_searched_and_named(tokenizer, tmp_path):
    from datasets import Dataset

    said = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(60)]
    said[37]["answer"] = None
    Dataset.from_list(said[:30]).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list(said[30:]).to_parquet(tmp_path / "b.parquet")
    source = SourceConfig(path=str(tmp_path / "*.parquet"), columns={"prompt": "question", "completion": "answer"})
    with pytest.raises(ValueError, match=r"b\.parquet row 8: turn 2 has content of type NoneType"):
        StreamedConversations([source], tokenizer, rows=1, positions=31).take(100)
    text = SourceConfig(path=source.path)
    with pytest.raises(ValueError, match=r"b\.parquet row 8: 'answer' holds NoneType; remove the row or give it text"):
        TextBatches(text, tokenizer, rows=1, positions=31, text_column="answer", streaming=True).take(100)
    with pytest.raises(ValueError, match="1 rows hold nothing in 'answer'"):  # not streamed, it is said before training
        TextBatches(text, tokenizer, rows=1, positions=31, text_column="answer")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_line_without_text_is_named(tokenizer, tmp_path, streaming):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n' * 20 + '{"text": 7}\n' + '{"text": "a"}\n' * 20)
    with pytest.raises(ValueError, match="t.jsonl line 21: .*'text' holds int"):
        TextBatches(
            SourceConfig(path=str(tmp_path / "t.jsonl")), tokenizer, rows=1, positions=15, streaming=streaming
        ).take(30)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({}, "needs path or task"),
        ({"path": "x", "repeat": 0}, "repeat=0 must be a whole number from 1"),
        ({"path": "x", "weight": 0}, "weight=0 must be above 0"),
        ({"path": "x", "weight": 2, "repeat": 2}, "say the same thing twice"),
        ({"path": "x", "rows": 0}, "rows=0 must be a whole number from 1"),
        ({"path": "x", "converter": "y"}, "converter='y' is unknown; choose from messages"),
        ({"path": "x", "columns": ["y"]}, "must map new names"),
        ({"path": "x", "weigth": 1}, r"unknown keys weigth \(did you mean weight\?\); known are path"),
        ("x", "must be a mapping"),
    ],
)
def test_a_wrong_entry_of_a_recipe_says_what_is_wrong(entry, reason):
    with pytest.raises(ValueError, match=reason):
        SourceConfig.from_recipe(entry)
