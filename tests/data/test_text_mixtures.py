"""Base text from several sources: shares by weight, exact resume, held-out files; and files chosen by a slice."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_hf.data.loading import load_shards, load_source
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.data.streamed import TextBatches
from nanochat_hf.data.texts import MixedTexts, Texts
from nanochat_hf.tokenizer import train_tokenizer
from nanochat_hf.training.base_texts import text_sources
from nanochat_hf.training.pretraining import BaseConfig

KINDS = ("apple", "brick", "cloud")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(KINDS) * 3], 280)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three data sets of three files of forty equally long texts; the last has its text in another column."""
    root = tmp_path_factory.mktemp("texts")
    for kind in KINDS:
        (root / kind).mkdir()
        column = "body" if kind == "cloud" else "text"
        for shard in range(3):
            rows = [f"{kind} {shard}{i:02d}" for i in range(40)]
            pq.write_table(pa.table({column: rows}), root / kind / f"shard_{shard}.parquet", row_group_size=8)
    return root


def sources(folders, **weights):
    columns = {"cloud": {"text": "body"}}
    return [
        SourceConfig(path=str(folders / kind), weight=weight, columns=columns.get(kind))
        for kind, weight in weights.items()
    ]


def batches(folders, tokenizer, streaming, **changes):
    mixture = changes.pop("mixture", None) or sources(folders, apple=3, brick=1, cloud=0.5)
    settings = dict(rows=2, positions=31, seed=5, mode="keep", prefetch=0, streaming=streaming)
    return TextBatches(mixture, tokenizer, **settings | changes)


def counted(made, tokenizer):
    """How many documents of each kind some batches hold."""
    texts = " ".join(tokenizer.decode(row) for batch in made for row in batch["input_ids"].tolist())
    return Counter(word for word in texts.replace("<|bos|>", " ").split() if word in KINDS)


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_come_in_proportion_to_their_weight(folders, tokenizer, streaming):
    found = counted(batches(folders, tokenizer, streaming).take(60), tokenizer)
    whole = sum(found.values())
    for kind, weight in dict(apple=3, brick=1, cloud=0.5).items():
        assert abs(found[kind] / whole - weight / 4.5) < 0.03, found


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_mixture_resumes_exactly(folders, tokenizer, streaming, num_workers):
    whole = batches(folders, tokenizer, streaming, num_workers=num_workers)
    begun = iter(whole)
    for _ in range(7):
        next(begun)
    state = json.loads(json.dumps(whole.state_dict()))
    expected = [next(begun)["input_ids"].tolist() for _ in range(9)]
    resumed = batches(folders, tokenizer, streaming, num_workers=num_workers)
    resumed.load_state_dict(state)
    assert [batch["input_ids"].tolist() for batch in resumed.take(9)] == expected


def test_another_mixture_is_not_resumed(folders, tokenizer):
    state = batches(folders, tokenizer, True).state_dict()
    other = batches(folders, tokenizer, True, mixture=sources(folders, apple=3, brick=1))
    single = batches(folders, tokenizer, True, mixture=sources(folders, apple=1)[0])
    for run in (other, single):
        with pytest.raises(ValueError, match="the checkpoint's stream is of"):
            run.load_state_dict(state)


def test_one_pass_takes_every_text_once(folders):
    mixture = MixedTexts([Texts(source) for source in sources(folders, apple=2, brick=1, cloud=1)])
    texts = list(mixture)
    assert len(texts) == len(set(texts)) == 360
    assert Counter(text.split()[0] for text in texts[:80]) == {"apple": 40, "brick": 20, "cloud": 20}
    assert [report.conversations for report in mixture.reports] == [120, 120, 120]


@pytest.mark.parametrize(("files", "shards"), [("-1:", {2}), (":-1", {0, 1}), ("1:2", {1}), (":", {0, 1, 2})])
def test_files_are_chosen_by_a_slice(folders, files, shards):
    source = SourceConfig(path=str(folders / "apple"), files=files)
    read = [raw.parsed()["text"] for shard in load_shards(source) for _, raw in shard.rows()]
    rows = load_source(source)
    assert {int(text.split()[1][0]) for text in read} == shards and len(read) == len(rows) == 40 * len(shards)


@pytest.mark.parametrize(
    ("files", "reason"), [("-1", "must be a slice"), ("a:b", "must be a slice"), ("3:", "leaves none of 3 files")]
)
def test_slices_that_cannot_be_are_named(folders, files, reason):
    with pytest.raises(ValueError, match=reason):
        load_source(SourceConfig(path=str(folders / "apple"), files=files))


def test_the_last_file_is_held_out_of_each_source(folders):
    entries = [{"path": str(folders / kind), "weight": 1} for kind in KINDS[:2]]
    base, found = text_sources(BaseConfig(tokenizer="t", validation="last"), {"train_data": entries})
    assert [source.files for source in found.train] == [":-1"] * 2
    assert [source.files for source in found.validation] == ["-1:"] * 2 and base.streaming is False
    _, first = text_sources(BaseConfig(tokenizer="t"), {"train_data": entries})
    assert [source.rows for source in first.validation] == [6, 6] and [s.start for s in first.train] == [6, 6]
    assert text_sources(BaseConfig(tokenizer="t", data="x"), {"train_data": entries})[1] is None
    with pytest.raises(ValueError, match="validation_data needs train_data"):
        text_sources(BaseConfig(tokenizer="t"), {"validation_data": entries})
