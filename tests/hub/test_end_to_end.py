"""Whole ways over a Hub on loopback, in processes of their own.

Train and push, resume elsewhere, load without the package, publish data sets.
"""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard
from safetensors.torch import load_file

from nanochat_hf import NanochatForCausalLM
from nanochat_hf.cli import push_dataset, push_to_hub
from nanochat_hf.conversation import render
from nanochat_hf.hub.dataset import write_dataset
from nanochat_hf.tokenizer import load_tokenizer
from tests.support.hub import TOKEN, environment, push
from tests.support.processes import Run

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"why is the sky {i}?"},
            {"role": "assistant", "content": f"the sea is {i}." * (i % 4 + 1)},
        ]
    }
    for i in range(40)
]
CHATS[3]["messages"][1]["content"] = [
    {"type": "text", "text": "it is "},
    {"type": "python", "text": "1+1"},
    {"type": "python_output", "text": "2"},
]


def start(hub, home, program, *argv, world=1):
    """A Run of a module, or of a file.py, that knows this Hub alone and has `home` for its cache."""
    home.mkdir(exist_ok=True)
    return Run(program, argv, home / "log", world, environment(hub, home))


def python(hub, home, program, *argv, world=1):
    """Let such a Run end; returns what it printed. Fails with that where the run fails."""
    run = start(hub, home, program, *argv, world=world)
    assert run.wait() == [0] * world, run.text()[-3000:]
    assert TOKEN not in run.text()
    return run.text()


def written(path, code):
    """The path of a file with this code."""
    path.write_text(code)
    return str(path)


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    return str(path)


def sft(chats, output, *more, model="user/base@main"):
    """Flags of a run of six steps."""
    return [
        "scripts.chat_sft",
        "--model",
        model,
        "--data",
        chats,
        "--output-dir",
        str(output),
        "--num-steps",
        "6",
        "--device-batch-size",
        "2",
        "--max-seq-len",
        "64",
        "--eval-every",
        "0",
        "--eval-batches",
        "1",
        "--log-every",
        "2",
        *more,
    ]


def test_training_pushes_through_faults_and_resumes_elsewhere_to_the_same_bits(hub, run, chats, tmp_path):
    push(run, repo_id="user/base")
    hub.fail("POST", "/user/chat/commit/", 500)
    hub.fail("PUT", "/lfs", "drop")
    flags = [
        "--save-every",
        "2",
        "--keep",
        "1",
        "--push-to-hub",
        "--hub-model-id",
        "user/chat",
        "--hub-strategy",
        "checkpoint",
    ]
    said = python(hub, tmp_path / "here", *sft(chats, tmp_path / "a", *flags))
    repo, files = hub.repos["models", "user/chat"], hub.files("user/chat")
    assert (
        "Step 2" in repo.titles
        and repo.titles[-1] == "Final model, step 6"
        and said.count("pushed to") == len(repo.titles) - 1
    )
    assert files["model.safetensors"] == (tmp_path / "a/final/model.safetensors").read_bytes()
    assert not (tmp_path / "a/.hub-stage").exists()
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "user/base" and [r.metric_type for r in card.data.eval_results] == ["bits_per_byte"]
    assert "| hardware | 1 × " in card.text and "torch 2" in card.text and "--resume user/chat" in card.text
    assert TOKEN.encode() not in b"".join(files.values()) + b"".join(
        p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()
    )

    step_2 = list(repo.commits)[repo.titles.index("Step 2")]
    said = python(hub, tmp_path / "there", *sft(chats, tmp_path / "b", "--resume", f"user/chat@{step_2}"))
    assert "at step 2 of 6" in said
    ours, theirs = (load_file(tmp_path / name / "final/model.safetensors") for name in "ab")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_base_training_pushes_its_checkpoints_and_its_model(hub, run, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"why is the sky {i} and the sea green? " * 3}) + "\n" for i in range(60))
    )
    said = python(
        hub,
        tmp_path / "home",
        "scripts.base_train",
        "--depth",
        "2",
        "--data",
        str(text),
        "--tokenizer",
        str(run / "final"),
        "--output-dir",
        str(tmp_path / "a"),
        "--num-steps",
        "4",
        "--save-every",
        "2",
        "--device-batch-size",
        "2",
        "--max-seq-len",
        "64",
        "--eval-every",
        "0",
        "--eval-batches",
        "1",
        "--push-to-hub",
        "--hub-model-id",
        "user/base",
        "--hub-strategy",
        "every_save",
    )
    files = hub.files("user/base")
    assert hub.repos["models", "user/base"].titles[-1] == "Final model, step 4" and "pushed to" in said
    assert files["model.safetensors"] == (tmp_path / "a/final/model.safetensors").read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model is None and [r.metric_type for r in card.data.eval_results] == ["bits_per_byte"]


def test_two_processes_push_once(hub, run, chats, tmp_path):
    flags = sft(
        chats, tmp_path / "a", "--push-to-hub", "--hub-model-id", "chat", "--hub-private", model=str(run / "final")
    )
    said = python(hub, tmp_path / "home", *flags, world=2)
    assert "on 2 processes" in said
    repo = hub.repos["models", "user/chat"]
    assert repo.private and repo.titles == ["initial commit", "Final model, step 6"]
    assert [path for _, path, _ in hub.requests].count(
        "/api/whoami-v2"
    ) == 1 and "last-checkpoint/trainer.json" not in hub.files("user/chat")
    assert "2 × " in hub.files("user/chat")["README.md"].decode()


def test_a_run_that_could_not_push_is_refused_before_the_model_is_loaded(hub, run, chats, tmp_path):
    for flags, message in (
        (["--push-to-hub"], "add --hub-model-id"),
        (["--push-to-hub", "--hub-model-id", "other/chat"], "write access"),
    ):
        run_ = start(hub, tmp_path / "home", *sft(chats, tmp_path / "a", *flags, model=str(run / "final")))
        assert run_.wait() == [2] and message in run_.text().splitlines()[-1] and "Traceback" not in run_.text()
    assert not (tmp_path / "a").exists()


def test_a_published_data_set_is_read_back_by_name(hub, run, chats, tmp_path):
    script = [
        "scripts.push_dataset",
        "--hub-dataset-id",
        "user/chats",
        "--data",
        chats,
        "--tokenizer",
        str(run / "final"),
    ]
    said = python(hub, tmp_path / "here", *script, "--license", "mit", "--validation", chats)
    assert "40 rows of train, 40 rows of validation" in said
    files = hub.files("user/chats", kind="datasets")
    card = DatasetCard(files["README.md"].decode())
    assert card.data.license == "mit" and "--data user/chats" in card.text and str(tmp_path) not in card.content
    code = """
import json
from nanochat_hf.data.planned import SFTBatches
from nanochat_hf.data.loading import load_source
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.tokenizer import load_tokenizer
import sys
rows = load_source(SourceConfig(path="user/chats", split="validation"))
tokenizer = load_tokenizer(sys.argv[1])
shape = dict(rows=2, positions=64)
ours, theirs = (iter(SFTBatches([SourceConfig(path=p)], tokenizer, **shape)) for p in (sys.argv[2], "user/chats"))
same = all(a[key].equal(b[key]) for _ in range(30) for a, b in [(next(ours), next(theirs))] for key in a)
print("FOUND" + json.dumps({"rows": [dict(r) for r in rows], "same": same}))
"""
    said = python(hub, tmp_path / "there", written(tmp_path / "read.py", code), str(run / "final"), chats)
    found = json.loads(re.search("^FOUND(.*)", said, re.M)[1])
    assert found["same"], "training on the published data set gives other batches than on the file"
    tokenizer = load_tokenizer(str(run / "final"))
    for row, chat in zip(found["rows"], CHATS, strict=True):
        assert row["messages"] == chat["messages"]
        assert (row["input_ids"], row["assistant_masks"]) == tuple(map(list, render(tokenizer, chat)))


def test_shards_have_one_schema_and_keep_the_order(tmp_path):
    from datasets import load_dataset

    counts = write_dataset({"train": CHATS}, tmp_path / "set", shard_bytes=700)  # row 3 alone has parts of its own kind
    files = sorted((tmp_path / "set/data").iterdir())
    assert (
        len(files) > 5 and files[0].name == f"train-00000-of-{len(files):05d}.parquet" and counts["train"]["rows"] == 40
    )
    found = load_dataset(
        "parquet", data_files=[str(f) for f in files], split="train", cache_dir=str(tmp_path / "cache")
    )
    assert [row["messages"] for row in found] == [row["messages"] for row in CHATS]
    with pytest.raises(ValueError, match="validation: no rows"):
        write_dataset({"validation": []}, tmp_path / "none")


def test_published_text_is_read_back_and_replaces_the_older_shards(hub, run, tmp_path):
    path = tmp_path / "text.jsonl"
    for rows in (5, 3):
        path.write_text("".join(json.dumps({"body": f"the sky <|bos|> {i}"}) + "\n" for i in range(rows)))
        flags = [
            "--hub-dataset-id",
            "texts",
            "--data",
            str(path),
            "--kind",
            "text",
            "--text-column",
            "body",
            "--tokenizer",
            str(run / "final"),
        ]
        push_dataset.main(flags)
    assert [name for name in hub.files("user/texts", kind="datasets") if name.endswith("parquet")] == [
        "data/train-00000-of-00001.parquet"
    ]
    code = """
import sys
from nanochat_hf.data.loading import load_source
from nanochat_hf.data.sources import SourceConfig
rows = load_source(SourceConfig(path="user/texts"))
ids, first = rows[2]["input_ids"], int(sys.argv[1])
print("FOUND", len(rows), rows[2]["text"], ids[0] == first, ids.count(first))
"""
    bos = load_tokenizer(str(run / "final")).bos_token_id
    said = python(hub, tmp_path / "there", written(tmp_path / "read.py", code), str(bos))
    assert "FOUND 3 the sky <|bos|> 2 True 1" in said


def test_the_cards_snippets_run_where_the_package_is_not_installed(hub, run, tmp_path):
    assert push(run)
    blocks = re.findall(r"```python\n(.*?)```", hub.files("user/tiny")["README.md"].decode(), re.S)
    assert len(blocks) == 2
    ids = [[5, 6, 7, 8]]
    code = f"""
import sys; sys.modules["nanochat_hf"] = None
{blocks[0]}
{blocks[1]}
import torch
torch.save(model(torch.tensor({ids})).logits, "logits.pt")
print("module", type(model).__module__)
"""
    # a stranger, so a Python of its own: no token, an empty cache, another folder
    unknown = environment(hub, tmp_path / "home") | {"HF_TOKEN": "", "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=unknown)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout
    assert "assistant" in said and "module transformers_modules" in said
    model = NanochatForCausalLM.from_pretrained(run / "final")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(torch.tensor(ids)).logits)


def test_the_script_pushes_a_run_or_a_model_folder(hub, run, tmp_path, capsys):
    (tmp_path / "answers.json").write_text(
        json.dumps([{"name": "spelling_bee", "accuracy": 0.75, "total": 4, "correct": 3}])
    )
    for code in (run / "final").glob("*_nanochat_hf.py"):
        code.unlink()  # as exports by older versions are
    for folder, repo_id in ((run, "user/one"), (run / "final", "user/two")):
        with pytest.raises(SystemExit, match="0"):
            push_to_hub.main(
                [
                    str(folder),
                    "--hub-model-id",
                    repo_id,
                    "--results",
                    str(tmp_path / "answers.json"),
                    "--license",
                    "mit",
                ]
            )
        files = hub.files(repo_id)
        assert {
            "metrics.jsonl",
            "training_config.json",
            "modeling_nanochat_hf.py",
            "configuration_nanochat_hf.py",
        } <= files.keys()
        data = ModelCard(files["README.md"].decode()).data
        assert data.license == "mit" and ("accuracy", 0.75) in {
            (r.metric_type, r.metric_value) for r in data.eval_results
        }
    capsys.readouterr()
    for argv, message in (
        (["nowhere", "--hub-model-id", "user/x"], "neither a run"),
        ([str(run), "--hub-model-id", "a/b/c"], "give org/name"),
        ([str(run), "--hub-model-id", "user/x", "--results", str(run / "metrics.jsonl")], "cannot be read"),
        ([str(run), "--hub-model-id", "user/x", "--with-checkpoint"], "no whole checkpoint"),
    ):
        with pytest.raises(SystemExit, match="2"):
            push_to_hub.main(argv)
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error
    assert ("models", "user/x") not in hub.repos


def test_a_dry_run_lists_what_a_push_sends_and_asks_nobody(hub, run, capsys):
    argv = [str(run), "--hub-model-id", "user/tiny", "--hub-private", "--license", "mit"]
    push_to_hub.main([*argv, "--dry-run"])
    said = capsys.readouterr().out
    assert not hub.requests and not list(run.glob(".hub-stage*"))
    assert (
        "repository user/tiny, branch main, private where it is new" in said
        and "license: mit" in said.split("README.md:")[1]
    )
    listed = {
        line.split()[1]: int(line.split()[0].replace(",", ""))
        for line in said.split("README.md:")[0].splitlines()[1:]
        if line
    }
    with pytest.raises(SystemExit, match="0"):
        push_to_hub.main(argv)
    sent = {name: len(data) for name, data in hub.files("user/tiny").items() if name != ".gitattributes"}
    assert listed == sent


def test_ctrl_c_ends_a_run_whose_last_push_hangs(hub, run, chats, tmp_path):
    flags = sft(chats, tmp_path / "a", "--push-to-hub", "--hub-model-id", "chat", model=str(run / "final"))
    hang = (
        "import runpy, sys, time\nfrom nanochat_hf.hub.push import HubPusher\n"
        "HubPusher._upload = lambda *_: (print('hangs', flush=True), time.sleep(100))\n"
        "runpy.run_module('scripts.chat_sft', run_name='__main__')"
    )
    process = start(hub, tmp_path / "home", written(tmp_path / "hang.py", hang), *flags[1:])
    deadline = time.monotonic() + 240
    while "hangs" not in process.text() and process.processes[0].is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # it now waits for the push
    process.kill(signal.SIGINT)
    assert process.wait(30) == [130] and "push to user/chat interrupted" in process.text(), process.text()
