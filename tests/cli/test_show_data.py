"""show_data says of every token what the batch says of it."""

import json

import pytest

from nanochat_hf.cli.show_data import drawn, histogram, main, spans
from nanochat_hf.data.planned import SFTBatches
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.tokenizer import train_tokenizer


@pytest.fixture
def data(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    parts = [
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "so 2"},
    ]
    rows = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]]
    rows += [[{"role": "user", "content": "sum"}, {"role": "assistant", "content": parts}]]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_spans_hold_the_row_with_roles_targets_and_padding(data):
    tokenizer = train_tokenizer(["ab"], 265)
    batch = next(iter(SFTBatches([SourceConfig(path=str(data))], tokenizer, rows=1, positions=47)))
    found = spans(batch, tokenizer)
    assert "".join(text for text, *_ in found) == tokenizer.decode(batch["input_ids"][0])
    trained = "".join(text for text, _, learned, _ in found if learned)
    assert sorted(trained.split("<|assistant_end|>")[:2]) == ["<|python_start|>1+1<|python_end|>so 2", "yes"]
    assert [text for text, role, *_ in found if role == "output"] == ["<|output_start|>2<|output_end|>"]
    assert sum(begins for *_, begins in found) == 2
    padding = int((batch["position_ids"][0] == 0).nonzero()[-1])
    assert f"[{47 - padding} × padding]" in drawn(batch, tokenizer, coloured=False)


def test_the_script_prints_rows_table_and_histogram_and_writes_pngs(data, tmp_path, capsys):
    train_tokenizer(["ab"], 265).save_pretrained(tmp_path / "tokenizer")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"max_seq_len: 47\nembedding_lr: 0.2\ntrain_data:\n  - {{path: {data}, repeat: 2}}\n")
    main(
        [
            "--config",
            str(recipe),
            "--tokenizer",
            str(tmp_path / "tokenizer"),
            "--output",
            str(tmp_path / "out"),
            "--force-color",
            "True",
        ]
    )
    printed = capsys.readouterr().out
    assert (
        "row 1 of 2" in printed
        and "chats.jsonl" in printed
        and "tokens of a document" in printed
        and "\x1b[32;4m" in printed
    )
    for name in ("lengths.png", "mixture.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_a_histogram_of_equal_lengths_is_one_bar():
    import numpy as np

    assert histogram(np.array([5, 5, 5])).splitlines()[1].endswith("█ 3")
