"""Held-out means held out: rows are chosen before they are dealt out to processes and workers."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_hf.data.loading import load_shards, load_source
from nanochat_hf.data.readers import Consumer, StreamReader
from nanochat_hf.data.sources import SourceConfig


def write(folder: Path, sizes: list[int]) -> int:
    """Files of so many rows each, numbered through, of three kinds; returns how many there are."""
    number = 0
    for old in folder.glob("*"):
        old.unlink()
    for shard, size in enumerate(sizes):
        rows = [{"n": number + i} for i in range(size)]
        number += size
        if shard % 3 == 0:
            (folder / f"{shard:03}.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
        elif shard % 3 == 1:
            (folder / f"{shard:03}.csv").write_text("n\n" + "".join(f"{row['n']}\n" for row in rows))
        else:
            (folder / f"{shard:03}.json").write_text(json.dumps(rows))
    return number


def epoch(source: SourceConfig, world_size: int, workers: int) -> list[int]:
    """The rows that all consumers read in the first epoch."""
    shards, read = load_shards(source), []
    for rank in range(world_size):
        reader = StreamReader(shards, source, 0, block=3)
        share = reader.shares(workers, world_size)
        for worker in range(share):
            rows, place = reader.open(Consumer(rank, world_size, worker, share))
            try:
                for row, _ in rows:
                    if place()["epoch"]:
                        break
                    read.append(int(row.parsed()["n"]))
            except ValueError as error:
                assert "no document for process" in str(error)
    return read


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_training_and_validation_share_no_row_and_every_other_row_is_read_once(tmp_path, data):
    sizes = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(lambda s: sum(s) > 2))
    world_size, workers = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    total = write(tmp_path, sizes)
    start = data.draw(st.integers(1, total - 1))
    rows = data.draw(st.integers(1, start))
    training = SourceConfig(path=str(tmp_path), start=start)
    validation = SourceConfig(path=str(tmp_path), rows=rows)
    trained, measured = epoch(training, world_size, workers), epoch(validation, world_size, 1)
    assert sorted(trained) == list(range(start, total))
    assert sorted(measured) == list(range(rows))
    assert [int(row["n"]) for row in load_source(training)] == list(range(start, total))


@pytest.mark.parametrize(
    "split", ["train[:90%]", "train[-10%:]", "train[3:7]", "train[50%:]", "all", "train[:2]+train[8:]"]
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "folder", "csv"])
def test_a_split_is_the_same_rows_for_every_kind_of_data_planned_and_streamed(tmp_path, kind, split):
    from datasets import Dataset

    rows = [{"n": i} for i in range(10)]
    path = tmp_path / ("data" if kind in ("saved", "folder") else f"data.{kind}")
    data = Dataset.from_list(rows)
    if kind == "saved":
        data.save_to_disk(path, num_shards=3)
    elif kind == "folder":
        path.mkdir()
        data.select(range(4)).to_parquet(path / "a.parquet")
        (path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[4:]))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        (data.to_parquet if kind == "parquet" else data.to_csv)(path)
    expected = {
        "train[:90%]": range(9),
        "train[-10%:]": range(9, 10),
        "train[3:7]": range(3, 7),
        "train[50%:]": range(5, 10),
        "all": range(10),
        "train[:2]+train[8:]": (0, 1, 8, 9),
    }[split]
    source = SourceConfig(path=str(path), split=split)
    assert [int(row["n"]) for row in load_source(source)] == list(expected)
    assert [int(raw.parsed()["n"]) for shard in load_shards(source) for _, raw in shard.rows()] == list(expected)
    for load in (load_source, load_shards):
        with pytest.raises(ValueError, match="no split 'nosuch', it has train"):
            load(SourceConfig(path=str(path), split="nosuch"))


def test_a_task_is_cut_by_its_split_too(tmp_path):
    (tmp_path / "g.jsonl").write_text(
        "".join(json.dumps({"question": f"q{i}", "answer": "a"}) + "\n" for i in range(10))
    )
    source = SourceConfig(task="gsm8k", path=str(tmp_path / "g.jsonl"), split="train[90%:]")
    assert [row["question"] for row in load_source(source)] == ["q9"]
    generated = SourceConfig(task="calculator", split="train[5:8]")
    assert list(load_source(generated)) == list(load_source(SourceConfig(task="calculator", start=5, rows=3)))
    for wrong in (source, generated):
        with pytest.raises(ValueError, match="no split 'nosuch'"):
            load_source(SourceConfig(task=wrong.task, path=wrong.path, split="nosuch"))
