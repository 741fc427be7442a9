"""The recipes that ship: the reference's mixture under its Hub names, from a Hub on loopback."""

import io
import json
import os
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from huggingface_hub.constants import HF_HOME

from nanochat_hf.data.sources import SourceConfig
from tests.support.hub import ROOT, TOKEN, environment
from tests.support.hub_endpoints import Repo
from tests.support.hub_server import HubServer
from tests.support.processes import Run

RECIPES = ROOT / "scripts" / "recipes"


def parquet(rows):
    buffer = io.BytesIO()
    Dataset.from_list(rows).to_parquet(buffer)
    return buffer.getvalue()


def card(configs):
    """A README whose head names the files of each configuration and split."""
    entries = [
        {"config_name": name, "data_files": [{"split": split, "path": f"{folder}/{split}-*"} for split in splits]}
        for name, (folder, splits) in configs.items()
    ]
    return f"---\n{yaml.safe_dump({'configs': entries})}---\n".encode()


def chat(i):
    return {
        "messages": [
            {"content": f"Is {i} even?", "role": "user"},
            {"content": "yes" if i % 2 == 0 else "no", "role": "assistant"},
        ],
        "source": "made",
    }


def choice(i):
    return {"question": f"What is {i} + 1?", "subject": "sums", "choices": [str(i + k) for k in range(4)], "answer": 1}


def stored():
    """The files of the data sets that sft.yaml names."""
    sums = [
        {"question": f"What is {i} plus 1?", "answer": f"It is {i}+1=<<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"}
        for i in range(30)
    ]
    return {
        "HuggingFaceTB/smol-smoltalk": {
            "README.md": card({"default": ("data", ("train", "test"))}),
            "data/train-00000-of-00002.parquet": parquet([chat(i) for i in range(25)]),
            "data/train-00001-of-00002.parquet": parquet([chat(i) for i in range(25, 40)]),
            "data/test-00000-of-00001.parquet": parquet([chat(i) for i in range(12)]),
        },
        "cais/mmlu": {
            "README.md": card(
                {"all": ("all", ("test", "validation", "dev")), "auxiliary_train": ("auxiliary_train", ("train",))}
            ),
            "all/test-00000-of-00001.parquet": parquet([choice(i) for i in range(10)]),
            "all/validation-00000-of-00001.parquet": parquet([choice(i) for i in range(3)]),
            "all/dev-00000-of-00001.parquet": parquet([choice(i) for i in range(3)]),
            "auxiliary_train/train-00000-of-00001.parquet": parquet([{"train": choice(i)} for i in range(20)]),
        },
        "openai/gsm8k": {
            "README.md": card({"main": ("main", ("train", "test"))}),
            "main/train-00000-of-00001.parquet": parquet(sums),
            "main/test-00000-of-00001.parquet": parquet(sums[:8]),
        },
    }


@pytest.fixture(scope="module")
def data_hub():
    with HubServer({TOKEN: "user"}) as server:
        for name, files in stored().items():
            server.repos["datasets", name] = Repo()
            server.repos["datasets", name].commit("main", "all of it", files)
        yield server


@pytest.fixture
def work(tmp_path):
    """A working folder with the recipe's identity.jsonl, and the recipe with fewer generated rows."""
    lines = [
        [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": f"A model, number {i}."}]
        for i in range(6)
    ]
    (tmp_path / "identity.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = yaml.safe_load((RECIPES / "sft.yaml").read_text())
    for entry in recipe["train_data"]:
        if entry["task"] in ("simple_spelling", "spelling_bee"):
            entry["rows"] //= 2000
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def sft(hub, finished, work, *more):
    home = work / "home"
    home.mkdir(exist_ok=True)
    if (Path(HF_HOME) / "nanochat_hf").is_dir():  # the word list takes seconds to gather
        os.symlink(Path(HF_HOME) / "nanochat_hf", home / "nanochat_hf")
    shape = [
        "--max-seq-len",
        "128",
        "--device-batch-size",
        "2",
        "--total-batch-size",
        "256",
        "--eval-batches",
        "1",
        "--log-every",
        "1",
    ]
    flags = ["--config", "sft.yaml", "--model", finished / "final", "--output-dir", "run", *shape, *more]
    run = Run("scripts.chat_sft", flags, work / "log", environment=environment(hub, home), folder=work)
    assert run.wait() == [0], run.text()[-3000:]
    return run.text()


def test_the_default_recipe_loads_from_its_hub_names_and_trains(data_hub, finished, work):
    printed = sft(data_hub, finished, work, "--num-steps", "2")
    for said in (
        "smoltalk: read as a task's rows, 40 documents",
        "mmlu: read as a task's rows, 20 documents",
        "gsm8k: read as a task's rows, 60 documents",
        "custom_json:identity.jsonl: read as a task's rows, 12 documents",
        "simple_spelling: read as a task's rows, 100 documents",
        "spelling_bee: read as a task's rows, 40 documents",
        "272 conversations",
        "sft step 2/2",
    ):
        assert said in printed, (said, printed[-3000:])
    asked = {
        path.split("/")[2] for _, path, _ in data_hub.requests if "/resolve/" in path and path.startswith("/datasets/")
    }
    assert asked == {"HuggingFaceTB", "cais", "openai"}
    assert (work / "run" / "final" / "model.safetensors").is_file()


def test_a_hub_name_is_streamed(data_hub, finished, work):
    recipe = {
        "train_data": [{"path": "HuggingFaceTB/smol-smoltalk"}],
        "validation_data": [{"path": "HuggingFaceTB/smol-smoltalk", "split": "test"}],
    }
    (work / "sft.yaml").write_text(yaml.safe_dump(recipe))
    printed = sft(data_hub, finished, work, "--streaming", "true", "--num-steps", "2")
    assert "1 streams" in printed and "sft step 2/2" in printed, printed[-3000:]


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.glob("sft*.yaml")))
def test_every_entry_of_a_recipe_is_a_source(name):
    recipe = yaml.safe_load((RECIPES / name).read_text())
    sources = [SourceConfig.from_recipe(entry) for key in ("train_data", "validation_data") for entry in recipe[key]]
    assert {"gsm8k", "simple_spelling", "spelling_bee", "mmlu"} <= {source.task for source in sources}
