"""Pushing and fetching through huggingface_hub's real client, against a Hub on loopback; Xet is not covered."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants

from nanochat_hf import NanochatForCausalLM
from nanochat_hf.hub.card import KEEP_END, KEEP_START, CardFacts
from nanochat_hf.hub.push import HubConfig, HubPusher, fetch_checkpoint, fetch_model
from nanochat_hf.training.callbacks.push import Push
from nanochat_hf.training.generators import rng_state
from tests.support.hub import SETTINGS, TOKEN, push


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).rglob("*") if p.is_file()}


def test_everything_lands_and_nothing_private(hub, run, capfd):
    before = hashes(run)
    assert push(run)
    files = hub.files("user/tiny")
    assert files.keys() >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "modeling_nanochat_hf.py",
        "configuration_nanochat_hf.py",
        "README.md",
        "curves.png",
        "metrics.jsonl",
        "training_config.json",
    }
    assert files["model.safetensors"] == (run / "final" / "model.safetensors").read_bytes()
    assert files["curves.png"].startswith(b"\x89PNG") and files["metrics.jsonl"] == (run / "metrics.jsonl").read_bytes()
    assert json.loads(files["training_config.json"]) == SETTINGS | {"output_dir": "sft"}
    assert any("lfs-part" in path for _, path, _ in hub.requests), "the weights were to go in several parts"
    assert hashes(run) == before, "pushing changed or left something in the run's folder"
    everything = (
        b"".join(files.values())
        + b"".join(capfd.readouterr()[i].encode() for i in (0, 1))
        + repr(vars(HubConfig())).encode()
    )
    assert TOKEN.encode() not in everything and b"/home/someone" not in everything


def test_card_holds_metadata_results_training_and_limits(hub, run):
    assert push(run, submit={"facts": CardFacts({"gsm8k": 0.25, "chatcore": 0.1})})
    text = hub.files("user/tiny")["README.md"].decode()
    data = ModelCard(text).data
    assert (data.license, data.language, data.base_model, data.datasets) == (
        "apache-2.0",
        "en",
        "org/base",
        ["org/chats"],
    )
    assert (data.pipeline_tag, data.library_name, data.model_name) == ("text-generation", "transformers", "tiny")
    found = {(r.dataset_type, r.metric_type): r.metric_value for r in data.eval_results}
    assert found == {
        ("org/chats", "bits_per_byte"): 1.25,
        ("openai/gsm8k", "accuracy"): 0.25,
        ("chatcore", "chatcore_metric"): 0.1,
    }
    for row in (
        "| tokens | 40,960 |",
        "| FLOPs | 3.2e+12 |",
        "| training time | 2 min 05 s |",
        "| MFU (mean of the log) | 42.0% |",
        "| hardware | 2 × H100, mixed precision bf16 |",
        "| code | git 0123456789ab |",
        "| versions | torch 2.13.0 |",
        "| `matrix_lr` | 0.02 |",
    ):
        assert row in text
    assert (
        f"{sum(p.numel() for p in NanochatForCausalLM.from_pretrained(run / 'final').parameters()):,} parameters"
        in text
    )
    assert "## Limits" in text and "(curves.png)" in text and "`spelling_bee`" in text and "last-checkpoint" not in text


def test_text_between_the_marks_and_own_metadata_stay(hub, run):
    push(run)
    repo = hub.repos["models", "user/tiny"]
    text = hub.files("user/tiny")["README.md"].decode()
    edited = text.replace("license: apache-2.0", "license: mit\nthumbnail: x.png").replace(
        KEEP_START, f"{KEEP_START}\nMy *own* words."
    )
    repo.commit(
        "main", "by hand", hub.files("user/tiny") | {"README.md": edited.replace("## Limits", "## Lost").encode()}
    )
    assert push(run)
    again = hub.files("user/tiny")["README.md"].decode()
    assert "My *own* words." in again.split(KEEP_START)[1].split(KEEP_END)[0] and "## Lost" not in again
    front = yaml.safe_load(again.split("---")[1])
    assert (front["license"], front["thumbnail"]) == ("mit", "x.png")
    assert again.count("My *own* words.") == 1 and len(front["tags"]) == len(set(front["tags"]))
    commits = len(repo.commits)
    assert push(run) and len(repo.commits) == commits, "an unchanged push made another commit"


def test_a_card_that_a_person_wrote_is_kept_whole(hub, run):
    hub_file = b"---\nlicense: gpl\nlanguage: de\n---\n# Mine\n\nAll of it.\n"
    HubPusher("user/tiny", say=print)
    hub.repos["models", "user/tiny"].commit("main", "by hand", {"README.md": hub_file})
    assert push(run)
    text = hub.files("user/tiny")["README.md"].decode()
    assert text.split(KEEP_START)[1].split(KEEP_END)[0].strip() == "# Mine\n\nAll of it."
    assert ModelCard(text).data.license == "gpl" and ModelCard(text).data.language == "de"


def test_a_card_that_cannot_be_read_is_not_written_over(hub, run):
    assert push(run) and push(run)  # the second reads the first's card, which so comes into the client's cache
    repo, said = hub.repos["models", "user/tiny"], []
    edited = hub.files("user/tiny")["README.md"].replace(KEEP_START.encode(), f"{KEEP_START}\nMine.".encode())
    repo.commit("main", "by hand", hub.files("user/tiny") | {"README.md": edited})
    hub.fail("HEAD", "README.md", 500, times=99)  # the client's cache has the older card
    assert not push(run, said=said) and "500" in said[0] and hub.files("user/tiny")["README.md"] == edited
    hub.faults.clear()
    hub.fail("HEAD", "README.md", "drop")
    assert push(run) and b"\nMine.\n" in hub.files("user/tiny")["README.md"]


def test_a_500_and_a_dropped_connection_are_retried(hub, run):
    said = []
    hub.fail("POST", "/preupload/", 500)
    hub.fail("PUT", "/lfs-part/", "drop")
    hub.fail("POST", "/commit/", 500)
    hub.fail("POST", "/api/repos/create", "drop")
    assert push(run, said=said)
    assert [left for *_, left in hub.faults] == [0, 0, 0, 0], "a fault was never met"
    assert hub.files("user/tiny")["model.safetensors"] == (run / "final" / "model.safetensors").read_bytes()
    assert len(said) == 1 and said[0].startswith("pushed to")


def test_a_hub_that_stays_down_is_told_and_leaves_the_folder_whole(hub, run):
    said, before = [], hashes(run)
    hub.fail("POST", "/commit/", 503, times=99)
    assert not push(run, said=said)
    assert hashes(run) == before and len(said) == 1
    assert "503" in said[0] and f"scripts.push_to_hub {run / 'final'} --hub-model-id user/tiny" in said[0]
    assert sum(path.endswith("/commit/main") for _, path, _ in hub.requests) == 3
    hub.faults.clear()
    assert push(run)


def test_an_expired_token_is_not_retried_and_a_fresh_one_helps(hub, run, monkeypatch):
    said = []
    pusher = HubPusher("user/tiny", wait=0.01, say=said.append)
    hub.tokens = {"hf_freshOne": "user"}  # the old one runs out during training
    pusher.submit(run / "final", run_dir=run)
    assert not pusher.finish() and "401" in said[0] and TOKEN not in said[0]
    assert sum((method, token) == ("HEAD", TOKEN) for method, _, token in hub.requests) == 1
    monkeypatch.setenv("HF_TOKEN", "hf_freshOne")
    hub.fail("POST", "/commit/", 401)  # once more, after the files are up
    for arrived in (False, True):
        pusher.submit(run / "final", run_dir=run)
        assert pusher.finish() == arrived
    assert "401" in said[1] and sum("/commit/" in path for _, path, _ in hub.requests) == 2


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        (None, "user/m", "not logged in .*hf auth login"),
        ("hf_old", "user/m", "401.*expired"),
        (TOKEN, "other/m", "403.*write access"),
    ],
)
def test_what_would_fail_at_the_end_is_refused_at_the_start(hub, monkeypatch, token, repo_id, message):
    monkeypatch.setenv("HF_TOKEN", token or "")
    config = HubConfig(push_to_hub=True, hub_model_id=repo_id)
    with pytest.raises(ValueError, match=message) as caught:
        HubPusher.from_config(config)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)


def test_a_hub_out_of_reach_is_refused_at_the_start(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("nanochat_hf.hub.client.time.sleep", lambda seconds: None)
    with pytest.raises(ValueError, match="network"):
        HubPusher("user/m")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"push_to_hub": True}, "add --hub-model-id"),
        ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "give org/name"),
        ({"push_to_hub": True, "hub_model_id": "-x-/y"}, "give org/name"),
        ({"hub_model_id": "a/b"}, "add --push-to-hub"),
        ({"hub_strategy": "often"}, "end, every_save, checkpoint"),
    ],
)
def test_configuration_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        HubConfig(**fields)


def test_nobody_but_rank_0_pushes(hub, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert HubPusher.from_config(HubConfig(push_to_hub=True, hub_model_id="user/m")) is None and not hub.requests


def test_waiting_pushes_give_way_and_pruning_takes_nothing_away(hub, run):
    pusher = HubPusher("tiny", wait=0.01, say=print)  # a bare name lies in one's own namespace
    assert pusher.repo_id == "user/tiny"
    models = [shutil.copytree(run / "final", run / name) for name in "abc"]
    with hub.lock:  # the Hub answers nothing, so that the first push hangs and the others wait
        for name, model in zip("abc", models, strict=True):
            (model / "name.txt").write_text(name)
            pusher.submit(model, run_dir=run, message=name)
            shutil.rmtree(model)
    assert pusher.finish()
    titles = hub.repos["models", "user/tiny"].titles
    assert titles[0] == "initial commit" and titles[1:] == ["a", "c"] and hub.files("user/tiny")["name.txt"] == b"c"
    assert hub.files("user/tiny")["model.safetensors"] == (run / "final" / "model.safetensors").read_bytes()
    assert not (run / ".hub-stage").exists()


def test_private_repository_branch_and_revision(hub, run, tmp_path, monkeypatch):
    assert push(run, private=True, revision="v2")
    repo = hub.repos["models", "user/tiny"]
    assert (
        repo.private
        and "README.md" not in hub.files("user/tiny")
        and 'revision="v2"' in hub.files("user/tiny", "v2")["README.md"].decode()
    )
    folder = Path(fetch_model("user/tiny@v2"))
    assert (folder / "model.safetensors").read_bytes() == hub.files("user/tiny", "v2")["model.safetensors"]
    assert not (folder / "metrics.jsonl").exists()
    assert {token for _, path, token in hub.requests if path.startswith("/cdn/")} == {None}, (
        "the token went to another host"
    )
    assert fetch_model(str(run / "final")) == str(run / "final")
    for name, message in (
        ("user/tiny", "no config.json"),
        ("user/nothing", "neither a folder here nor"),
        ("user/tiny@v9", "neither"),
        ("./no/where", "no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            fetch_model(name)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "strangers"))
    with pytest.raises(ValueError, match="neither"):
        fetch_model("user/tiny@v2")


def make_checkpoint(run, ranks):
    folder = Path(shutil.copytree(run / "final", run / "checkpoint-000004", dirs_exist_ok=True))
    for path in folder.glob("rank*.pt"):
        path.unlink()
    (folder / "trainer.json").write_text("{}")
    state = {"optimizer": {"m": torch.ones(3)}, "data": {"next_row": 7}, "rng": rng_state()}
    for rank in range(ranks):
        torch.save(state, folder / f"rank{rank}.pt")
    return folder


def test_checkpoints_travel_and_stale_ranks_do_not_stay(hub, run):
    assert push(run, submit={"checkpoint": make_checkpoint(run, 2)})
    assert {"last-checkpoint/rank0.pt", "last-checkpoint/rank1.pt", "last-checkpoint/trainer.json"} <= hub.files(
        "user/tiny"
    ).keys()
    assert (
        "rank0.pt" not in hub.files("user/tiny")
        and "--resume user/tiny" in hub.files("user/tiny")["README.md"].decode()
    )
    assert push(run, submit={"checkpoint": make_checkpoint(run, 1)})
    assert "last-checkpoint/rank1.pt" not in hub.files("user/tiny")
    folder = Path(fetch_checkpoint("user/tiny"))
    assert hashes(folder) == hashes(run / "checkpoint-000004")
    assert (
        fetch_checkpoint(None) is None
        and fetch_checkpoint("auto") == "auto"
        and fetch_checkpoint(str(folder)) == str(folder)
    )


@pytest.mark.parametrize(
    ("strategy", "titles", "state"),
    [
        ("end", ["Final model, step 8"], False),
        ("every_save", ["Step 4", "Final model, step 8"], False),
        ("checkpoint", ["Step 4", "Final model, step 8"], True),
    ],
)
def test_the_callback_pushes_by_its_strategy(hub, run, strategy, titles, state):
    make_checkpoint(run, 1)
    callback = Push(HubPusher("user/tiny", strategy=strategy, wait=0.01, say=print), run)
    for step in (2, 4, 8):  # nothing was saved at 2; the last step is left to finish
        callback(SimpleNamespace(num_steps=8, stopped=False), SimpleNamespace(step=step))
    callback.pusher.jobs and callback.pusher.jobs[0][
        0
    ].result()  # else the final push could take the waiting one's place
    (run / "final" / "name.txt").write_text("final")
    callback.finish(run / "final", step=8)
    assert hub.repos["models", "user/tiny"].titles[1:] == titles
    files = hub.files("user/tiny")
    assert ("last-checkpoint/rank0.pt" in files) == state and "rank0.pt" not in files and "trainer.json" not in files


def test_a_run_that_is_stopped_pushes_what_it_saved(hub, run):
    make_checkpoint(run, 1)
    callback = Push(HubPusher("user/tiny", strategy="checkpoint", wait=0.01, say=print), run)
    callback(SimpleNamespace(num_steps=4, stopped=True), SimpleNamespace(step=4))
    callback.finish()
    assert hub.repos["models", "user/tiny"].titles[1:] == ["Step 4"] and "last-checkpoint/rank0.pt" in hub.files(
        "user/tiny"
    )
    nothing = Push(None, run)  # without --push-to-hub, and on every process but the main one
    nothing(SimpleNamespace(num_steps=4, stopped=True), SimpleNamespace(step=4))
    nothing.finish(run / "final", step=4)


def test_a_checkpoint_that_would_run_code_is_refused(hub, run):
    folder = make_checkpoint(run, 1)

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(run / "owned"),))

    torch.save({"optimizer": Evil()}, folder / "rank0.pt")
    assert push(run, submit={"checkpoint": folder})
    with pytest.raises(ValueError, match="rank0.pt holds more than plain data"):
        fetch_checkpoint("user/tiny")
    (folder / "rank0.pt").write_bytes(pickle.dumps(Evil()))
    assert push(run, submit={"checkpoint": folder})
    with pytest.raises(ValueError, match="refused"):
        fetch_checkpoint("user/tiny")
    assert not (run / "owned").exists()
    assert push(run, repo_id="user/other")
    with pytest.raises(ValueError, match="no last-checkpoint"):
        fetch_checkpoint("user/other")
