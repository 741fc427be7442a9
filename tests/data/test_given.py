"""What a user gave is what the model learns, or a line says so: forms, columns, weights, and kinds of files."""

import csv
import json

import numpy as np
import pytest
import torch

from nanochat_hf.data.conversations import convert
from nanochat_hf.data.planned import SFTBatches
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.data.streamed import StreamedConversations, TextBatches
from nanochat_hf.data.texts import Texts
from nanochat_hf.files.data_file import Raw
from nanochat_hf.tokenizer import train_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["ab"], 265)


def write(path, rows):
    """The rows as a file of the kind that the name says."""
    from datasets import Dataset

    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == "":
        Dataset.from_list(rows).save_to_disk(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def learned(tokenizer, path, stream=False, **source):
    """[(what the model sees, what of it is trained)] of each document, in a pass; and the report."""
    sources = [SourceConfig(path=str(path), **source)]
    kind = StreamedConversations if stream else SFTBatches
    batches = kind(sources, tokenizer, rows=1, positions=255, prefetch=0)
    if not stream:
        return [shown(tokenizer, d["ids"], d["mask"]) for d in batches.documents], batches.report
    rows = [(b["input_ids"][0], (b["shift_labels"][0] >= 0).roll(1)) for b in batches.take(5)]
    return [shown(tokenizer, ids, mask) for ids, mask in rows], batches.report


def shown(tokenizer, ids, mask):
    return tokenizer.decode(list(ids)), tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])


ASK = {"role": "user", "content": "q"}
KINDS = ["c.jsonl", "c.json", "c.parquet", "saved"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_keys_that_arrow_filled_in_are_no_arguments(tokenizer, tmp_path, name, stream):
    calls = [
        {"name": "weather", "arguments": {"city": "Oslo"}},
        {"name": "price", "arguments": {"of": {"stock": "X"}, "days": [{"a": 1}]}},
    ]
    rows = [
        {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [{"function": call}]}]}
        for call in calls
    ]
    said, report = learned(tokenizer, write(tmp_path / name, rows), stream)
    text = "".join(trained for _, trained in said)
    assert 'weather{"city": "Oslo"}' in text and 'price{"of": {"stock": "X"}, "days": [{"a": 1}]}' in text
    assert "null" not in text and not report.ignored


def test_a_null_that_was_written_is_an_argument(tokenizer, tmp_path):
    row = {
        "messages": [
            ASK,
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"day": None}}}]},
        ]
    }
    [(_, trained)], _ = learned(tokenizer, write(tmp_path / "c.jsonl", [row]))
    assert 'f{"day": null}' in trained


def say(content):
    return {"role": "assistant", "content": content}


def part(kind, **marks):
    return {"type": kind, "text": "x", **marks}


FORMS = [
    {"messages": [ASK, {"role": "assistant", "content": "a"}]},
    {"messages": json.dumps([ASK, {"role": "assistant", "content": "a"}])},
    {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}},
    {"messages": [json.dumps(ASK), json.dumps({"role": "assistant", "content": "a"})]},
    {"conversations": [ASK, {"role": "assistant", "content": "a"}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"conversations": json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])},
    {"prompt": "q", "completion": "a"},
    {"instruction": "q", "input": "", "output": "a", "history": [], "system": ""},
]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("form", FORMS, ids=lambda row: ",".join(row))
def test_every_form_in_every_kind_of_file(tokenizer, tmp_path, form, name):
    said, report = learned(tokenizer, write(tmp_path / name, [form] * 3))
    assert (
        said == [("<|bos|><|user_start|>q<|user_end|><|assistant_start|>a<|assistant_end|>", "a<|assistant_end|>")] * 3
    )
    assert report.left_out == ""


@pytest.mark.parametrize("name", [*KINDS, "c.csv"])
@pytest.mark.parametrize("stream", [False, True])
def test_alpacas_history_and_system_are_in_the_prompt(tokenizer, tmp_path, name, stream):
    row = {"instruction": "c", "input": "d", "output": "e", "system": "s", "history": [["a", "b"]], "source": "x"}
    said, report = learned(tokenizer, write(tmp_path / name, [row]), stream)
    seen, trained = said[0]
    assert seen.startswith("<|bos|><|user_start|>s\n\na<|user_end|><|assistant_start|>b<|assistant_end|>")
    assert "<|user_start|>c\n\nd<|user_end|>" in seen and trained.startswith("b<|assistant_end|>e<|assistant_end|>")
    assert list(report.ignored) == ["source"] and "ignored columns: source (" in report.left_out


@pytest.mark.parametrize("name", ["c.csv", "c.tsv", "c.jsonl", "c.json", "c.parquet", "saved"])
def test_answers_that_look_like_something_else_are_text(tokenizer, tmp_path, name):
    cells = ["007", "NA", "null", "None", "1e5", "True", "2020-01-01", "12:30:00", "nan"]
    rows = [{"prompt": "q", "completion": cell} for cell in cells]
    path = tmp_path / name
    if path.suffix == ".tsv":
        path.write_text("prompt\tcompletion\n" + "".join(f"q\t{cell}\n" for cell in cells))
    else:
        write(path, rows)
    said, _ = learned(tokenizer, path)
    assert [trained for _, trained in said] == [f"{cell}<|assistant_end|>" for cell in cells]


def marked(weight, train=None):
    marks = {} if weight is None else {"weight": weight}
    marks |= {} if train is None else {"train": train}
    return {
        "messages": [ASK, {"role": "assistant", "content": "no", **marks}, ASK, {"role": "assistant", "content": "yes"}]
    }


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("row", [marked(0), marked(None, False), marked(0.0, True), marked(1, False)])
def test_a_message_of_weight_0_is_not_trained_on(tokenizer, tmp_path, name, stream, row):
    said, report = learned(tokenizer, write(tmp_path / name, [row]), stream)
    assert said[0][0].count("no<|assistant_end|>") and "no" not in said[0][1] and "yes<|assistant_end|>" in said[0][1]
    assert not report.ignored


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("everything", [False, True])
def test_other_weights_become_the_losss_weights(tokenizer, tmp_path, name, stream, everything):
    source = [SourceConfig(path=str(write(tmp_path / name, [marked(0.5), marked(0), marked(None)])))]
    kind = StreamedConversations if stream else SFTBatches
    batches = kind(source, tokenizer, rows=1, positions=255, prefetch=0, train_on_all_tokens=everything)
    made = batches.take(5 if stream else 1)
    labels, weights = (torch.cat([batch[key][0] for batch in made]) for key in ("shift_labels", "loss_weights"))
    by_weight = {w: tokenizer.decode(labels[(weights == w) & (labels >= 0)]) for w in (0.0, 0.5, 1.0)}
    halves, wholes = (by_weight[w].count("no<|assistant_end|>") for w in (0.5, 1.0))
    assert halves > 0 and wholes > 0 and (stream or halves == wholes == 1)
    assert by_weight[0.0] == "" and "yes<|assistant_end|>" in by_weight[1.0]
    assert ("q<|user_end|>" in by_weight[1.0]) == everything


def test_messages_that_become_one_turn_keep_their_weights(tokenizer, tmp_path):
    call = {"function": {"name": "calculator", "arguments": {"expression": "1+1"}}}
    row = {
        "messages": [
            ASK,
            {"role": "assistant", "content": "x", "tool_calls": [call], "weight": 0},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "two"},
        ]
    }
    [(seen, trained)], _ = learned(tokenizer, write(tmp_path / "c.jsonl", [row]))
    assert "<|output_start|>2<|output_end|>two" in seen and trained == "two<|assistant_end|>"


@pytest.mark.parametrize("name", [*KINDS, "c.csv"])
@pytest.mark.parametrize("stream", [False, True])
def test_columns_rename_and_what_they_replace_is_told(tokenizer, tmp_path, name, stream):
    path = write(tmp_path / name, [{"prompt": "p", "completion": "old", "better": "new"}] * 3)
    said, report = learned(tokenizer, path, stream, columns={"completion": "better"})
    assert "new<|assistant_end|>" in said[0][1] and "old" not in said[0][0]
    assert list(report.ignored) == ["completion (replaced by better)"]
    swapped, _ = learned(tokenizer, path, stream, columns={"completion": "prompt", "prompt": "better"})
    assert swapped[0][0].startswith("<|bos|><|user_start|>new<|user_end|><|assistant_start|>p<|assistant_end|>")
    with pytest.raises(ValueError, match="[12]: no column 'beter'; it has prompt, completion, better"):
        learned(tokenizer, path, stream, columns={"completion": "beter"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [ASK, {"role": "assistant", "content": [None]}]}, "the part None"),
        ({"messages": [ASK, {"role": "assistant", "content": "\ud83d"}]}, "half a character"),
        (
            {"messages": [{"role": "user", "content": "a \ud83d b"}, {"role": "assistant", "content": "x"}]},
            "half a char",
        ),
        ({"messages": [ASK, None]}, "turn 2 has role None"),
        ({"messages": "[1, 2"}, "messages holds text that is no JSON"),
        ({"messages": {"role": ["user"], "content": []}}, "different lengths"),
        (marked(-1), "weight -1; give a number from 0"),
        (marked("x"), "weight 'x'"),
        (marked(True), "weight True"),
        (marked(1, "no"), "train 'no'; give true or false"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, r"history must be a list of \[question, answer\]"),
        ({"instruction": "a", "output": "b", "system": 5}, "system holds int"),
        ({"prompt": "a", "completion": 5}, "content of type int"),
        ({"conversations": [{"from": ["x"], "value": 1}]}, "conversations must be a list"),
        ({"messages": [ASK, {"role": "assistant", "tool_calls": [None]}]}, "calls no function by name"),
        ({"messages": [ASK, {"role": "assistant", "tool_calls": 7}]}, "tool_calls of type int"),
        (
            {"messages": [ASK, say([part("text", weight=0), part("text")])]},
            "parts between two outputs have the weights 0.0 and 1.0",
        ),
    ],
)
def test_what_cannot_be_honoured_is_one_line(row, reason):
    with pytest.raises(ValueError, match=f"^row 3: .*{reason}") as caught:
        convert(Raw(json.dumps(row).encode(), "row 3"), SourceConfig(path="x"))
    assert "\n" not in str(caught.value)


def test_keys_of_messages_that_are_not_used_are_counted(tokenizer, tmp_path):
    said = {"role": "assistant", "content": "a", "thinking": "hm", "name": "bot", "empty": ""}
    rows = [{"messages": [ASK, said], "tools": [{"name": "f"}], "id": i} for i in range(3)]
    _, report = learned(tokenizer, write(tmp_path / "c.jsonl", rows))
    assert report.ignored == {"id": 3, "messages.name": 3, "messages.thinking": 3}


TOOL = {
    "type": "function",
    "function": {"name": "now", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}},
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_declared_tools_are_in_the_prompt_and_their_calls_as_clients_write_them(
    tokenizer, tmp_path, name, stream, as_text
):
    call = {"id": "a", "type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
    messages = [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
        {"role": "tool", "content": "3", "tool_call_id": "a"},
        {"role": "assistant", "content": "three"},
    ]
    row = {"tools": json.dumps([TOOL]) if as_text else [TOOL], "messages": messages}
    said, report = learned(tokenizer, write(tmp_path / name, [row]), stream)
    seen, trained = said[0]
    heading = f"Tools, called as NAME{{ARGUMENTS}}:\n{json.dumps(TOOL['function'])}\n\nq<|user_end|>"
    assert heading in seen and '<|python_start|>now{"zone": "UTC"}<|python_end|>' in seen
    assert "three<|assistant_end|>" in trained and "now" not in trained and not report.ignored


def test_a_text_that_cannot_be_encoded_is_named_or_left_out(tokenizer, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "hello"}\n' * 20 + '{"text": "cut \\ud83d"}\n' + '{"text": null}\n')
    for streaming in (False, True):
        with pytest.raises(ValueError, match="t.jsonl line 21: the text holds half a character"):
            list(Texts(SourceConfig(path=str(path)), streaming=streaming))
        texts = Texts(SourceConfig(path=str(path)), streaming=streaming, bad_rows="skip")
        assert list(texts) == ["hello"] * 20
        assert texts.report.bad == 2 and "line 21" in texts.report.first_bad
        batches = TextBatches(
            SourceConfig(path=str(path)), tokenizer, rows=1, positions=31, streaming=streaming, bad_rows="skip"
        )
        assert len(batches.take(2)) == 2 and batches.bad[0] >= 2


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"path": "x", "rows": "ten"}, "rows='ten' must be a whole number from 1"),
        ({"path": "x", "rows": 2.5}, "rows=2.5 must be"),
        ({"path": "x", "rows": True}, "rows=True must be"),
        ({"path": "x", "rows": float("inf")}, "rows=inf must be"),
        ({"path": "x", "start": -1}, "start=-1 must be"),
        ({"path": "x", "weight": "inf"}, "weight='inf' must be above 0"),
        ({"path": "x", "weight": float("nan")}, "weight=nan must be above 0"),
        ({"path": "x", "weight": [1]}, "weight=.1. must be above 0"),
        ({"path": "x", "columns": {"a": 1}}, "columns=.* must map new names"),
        ({"path": ["x", "y"]}, "path=.* must be text"),
        ({"path": 5}, "path=5 must be text"),
        ({"path": "x", "split": 5}, "split=5 must be text"),
        ({"path": "x", "split": "train[:"}, "split 'train..' cannot be read"),
        ({"path": "x", 5: 1, None: 2}, "unknown keys 5, None"),
    ],
)
def test_an_odd_entry_of_a_recipe_is_one_line(entry, reason):
    with pytest.raises(ValueError, match=reason):
        SourceConfig.from_recipe(entry)


def test_numbers_may_be_text_and_null_is_the_default(monkeypatch):
    source = SourceConfig.from_recipe({"path": "x", "rows": "1e3", "start": "10", "weight": "1e-1", "columns": None})
    assert (source.rows, source.start, source.weight, source.columns) == (1000, 10, 0.1, None)
    assert SourceConfig.from_recipe_list(None) == []
    for wrong in ("x", {"path": "x"}, 5):
        with pytest.raises(ValueError, match="train_data: .* must be a list"):
            SourceConfig.from_recipe_list(wrong)
    monkeypatch.setenv("HOME", "/home/me")
    assert SourceConfig(path="~/x.jsonl").path == "/home/me/x.jsonl"


def test_epochs_are_rounded_to_a_step_once(tokenizer, tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "a" * 200} for i in range(33)]
    path = str(write(tmp_path / "c.jsonl", rows))
    batches = SFTBatches([SourceConfig(path=path)], tokenizer, rows=8, positions=255)
    assert batches.num_rows == 33
    for epochs, accumulation, steps in ((3, 4, 3), (3, 1, 12), (0.1, 4, 1), (1, 1, 4)):
        assert batches.steps(epochs, accumulation) == steps
        assert batches.passes(steps, accumulation) == steps * 8 * accumulation / 33


@pytest.mark.parametrize("streaming", [False, True])
def test_a_validation_set_of_text_counts_each_document_once(tokenizer, tmp_path, streaming):
    lengths = np.random.default_rng(0).integers(3, 60, 37).tolist()
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"text": chr(97 + i % 26) * n}) + "\n" for i, n in enumerate(lengths))
    )
    batches = TextBatches(
        SourceConfig(path=str(tmp_path / "t.jsonl")), tokenizer, rows=4, positions=63, mode="keep", streaming=streaming
    )
    made = batches.once(1000)
    labels = [label for batch in made for label in batch["shift_labels"].flatten().tolist() if label >= 0]
    inputs = [
        i
        for batch in made
        for i, label in zip(batch["input_ids"][:, 0].tolist(), batch["shift_labels"][:, 0].tolist(), strict=True)
        if label >= 0
    ]
    text = [i for i in labels + inputs if i != tokenizer.bos_token_id]
    assert len(text) == sum(lengths) and all(len(b["input_ids"]) == 4 for b in made)
    assert len(batches.once(2)) == 2 and len(made) < 12
    assert batches.report.total("seen") == 0  # looking is not training
