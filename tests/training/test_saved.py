"""Checkpoints that are damaged, malformed or of another program.

Each kind is one line that names the file, and none is accepted.
"""

import json
import pickle
import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.data.planned import SFTBatches
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.optim import MuonAdamW, build_param_groups
from nanochat_hf.tokenizer import load_tokenizer
from nanochat_hf.training import checkpoint
from nanochat_hf.training.integrity import CHECKSUMS, damage, first_not_finite, seal
from nanochat_hf.training.resuming import choose
from nanochat_hf.training.trainer import Trainer
from tests.support.training import here


def trainer_of(start):
    accelerator = Accelerator(cpu=True)
    model = NanochatForCausalLM.from_pretrained(start / "model")
    sources = [SourceConfig(path=str(start / "chats.jsonl"))]
    batches = SFTBatches(sources, load_tokenizer(start / "model"), rows=2, positions=64, prefetch=0)
    optimizer = MuonAdamW(build_param_groups(model), orthogonalize_dtype=torch.float32)
    return Trainer(accelerator, model, optimizer, batches, num_steps=4, schedule=lambda *_: 1.0)


@pytest.fixture(scope="module")
def good(start, tmp_path_factory):
    """A checkpoint of two steps."""
    trainer = trainer_of(start)
    batches = iter(trainer.batches)
    for _ in range(2):
        trainer.step([next(batches)])
    return checkpoint.save(trainer, tmp_path_factory.mktemp("good"), load_tokenizer(start / "model"), {"seed": 0})


@pytest.fixture(scope="module")
def trainer(start):
    return trainer_of(start)


def facts(**changed):
    def change(folder):
        found = json.loads((folder / "trainer.json").read_text())
        (folder / "trainer.json").write_text(json.dumps(found | changed))

    return change


def counters(**changed):
    def change(folder):
        found = json.loads((folder / "trainer.json").read_text())
        found["state"] |= changed
        (folder / "trainer.json").write_text(json.dumps(found))

    return change


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40])


def tensors(change):
    def apply(folder):
        weights = load_file(folder / "model.safetensors")
        save_file(change(weights) or weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def saved(name, change):
    """`change(contents)` of a .pt file; what it returns, if anything, takes their place."""

    def apply(folder):
        contents = torch.load(folder / name, weights_only=True)
        returned = change(contents)
        torch.save(contents if returned is None else returned, folder / name)

    return apply


def moment(key, value):
    return saved("optimizer.pt", lambda saved: saved["optimizer"]["state"][0].update({key: value}))


def group(**changed):
    return saved("optimizer.pt", lambda saved: saved["optimizer"]["param_groups"][0].update(changed))


def data(**changed):
    return saved("rank0.pt", lambda saved: saved["data"].update(changed))


def generators(**changed):
    return saved("rank0.pt", lambda saved: saved["rng"].update(changed))


NAN = float("nan")
KINDS = {
    "facts empty": ("trainer.json", written("trainer.json", b"")),
    "facts binary": ("trainer.json", written("trainer.json", b"\xff\xfe\x00")),
    "facts cut": ("trainer.json", cut("trainer.json")),
    "facts list": ("trainer.json", written("trainer.json", b"[]")),
    "facts null": ("trainer.json", written("trainer.json", b"null")),
    "facts foreign": ("trainer.json", written("trainer.json", b'{"global_step": 3}')),
    "state list": ("trainer.json", facts(state=[1])),
    "state empty": ("trainer.json", facts(state={})),
    "step negative": ("trainer.json", counters(step=-1)),
    "step text": ("trainer.json", counters(step="2")),
    "step true": ("trainer.json", counters(step=True)),
    "step half": ("trainer.json", counters(step=2.5)),
    "step nan": ("trainer.json", counters(step=NAN)),
    "tokens negative": ("trainer.json", counters(tokens=-8)),
    "seconds nan": ("trainer.json", counters(seconds=NAN)),
    "seconds negative": ("trainer.json", counters(seconds=-1.0)),
    "skipped null": ("trainer.json", counters(skipped=None)),
    "counter unknown": ("trainer.json", counters(epoch=1)),
    "no processes": ("trainer.json", facts(num_processes=0)),
    "processes text": ("trainer.json", facts(num_processes="1")),
    "settings list": ("trainer.json", facts(settings=[1])),
    "trackers text": ("trainer.json", facts(trackers="wandb")),
    "callbacks list": ("trainer.json", facts(callbacks=[1])),
    "callback a number": ("trainer.json", facts(callbacks={"log": 3})),
    "weights empty": ("model.safetensors", written("model.safetensors", b"")),
    "weights garbage": ("model.safetensors", written("model.safetensors", b"x" * 999)),
    "weights cut": ("model.safetensors", cut("model.safetensors")),
    "weights gone": ("no model weights", lambda folder: (folder / "model.safetensors").unlink()),
    "weight missing": ("another architecture", tensors(lambda w: w.pop("lm_head.weight") is None)),
    "weight foreign": ("another architecture", tensors(lambda w: w.update(extra=torch.ones(1)))),
    "weight reshaped": ("another architecture", tensors(lambda w: {n: v[:1].contiguous() for n, v in w.items()})),
    "weights whole numbers": ("no floats", tensors(lambda w: {n: v.int() for n, v in w.items()})),
    "weight nan": ("lm_head.weight is not finite", tensors(lambda w: w["lm_head.weight"].fill_(NAN) is None)),
    "weight infinite": ("not finite", tensors(lambda w: w["lm_head.weight"].fill_(float("inf")) is None)),
    "optimizer gone": ("optimizer.pt", lambda folder: (folder / "optimizer.pt").unlink()),
    "optimizer empty": ("optimizer.pt", written("optimizer.pt", b"")),
    "optimizer garbage": ("optimizer.pt", written("optimizer.pt", b"x" * 999)),
    "optimizer cut": ("optimizer.pt", cut("optimizer.pt")),
    "optimizer pickle": (
        "optimizer.pt",
        written("optimizer.pt", pickle.dumps({"optimizer": {}, "scaler": None}, protocol=2)),
    ),
    "optimizer list": ("optimizer.pt", saved("optimizer.pt", lambda saved: [saved])),
    "optimizer without scaler": ("optimizer.pt", saved("optimizer.pt", lambda saved: saved.pop("scaler") and None)),
    "optimizer null": ("optimizer.pt", saved("optimizer.pt", lambda saved: saved.update(optimizer=None))),
    "optimizer text": ("optimizer.pt", saved("optimizer.pt", lambda saved: saved.update(optimizer="x"))),
    "optimizer no groups": (
        "optimizer.pt",
        saved("optimizer.pt", lambda s: s["optimizer"].pop("param_groups") and None),
    ),
    "optimizer state a list": ("optimizer.pt", saved("optimizer.pt", lambda s: s["optimizer"].update(state=[1]))),
    "group of other parameters": ("optimizer.pt", group(params=[99])),
    "lr text": ("optimizer.pt", group(lr="x")),
    "lr nan": ("optimizer.pt", group(initial_lr=NAN)),
    "lr negative": ("optimizer.pt", group(lr=-1.0)),
    "moment of another shape": ("optimizer.pt", moment("exp_avg", torch.zeros(3, 3))),
    "second moment of another shape": ("optimizer.pt", moment("exp_avg_sq", torch.zeros(3, 3))),
    "moment nan": ("optimizer.pt", moment("exp_avg", torch.tensor(NAN))),
    "moment text": ("optimizer.pt", moment("exp_avg", "x")),
    "moment whole numbers": ("optimizer.pt", moment("exp_avg", torch.zeros(3, dtype=torch.int64))),
    "rank gone": ("rank0.pt", lambda folder: (folder / "rank0.pt").unlink()),
    "rank empty": ("rank0.pt", written("rank0.pt", b"")),
    "rank foreign": ("rank0.pt", saved("rank0.pt", lambda saved: {"epoch": 1})),
    "data text": ("position of the data", saved("rank0.pt", lambda saved: saved.update(data="x"))),
    "data empty": ("position of the data", saved("rank0.pt", lambda saved: saved.update(data={}))),
    "data of other rows": ("the checkpoint's data has 3 rows", data(num_rows=3)),
    "data at a negative row": ("next_row", data(next_row=-5)),
    "data at half a row": ("next_row", data(next_row=2.5)),
    "data at a text": ("next_row", data(next_row="3")),
    "generators null": ("rank0.pt", saved("rank0.pt", lambda saved: saved.update(rng=None))),
    "generators lacking": ("rank0.pt", saved("rank0.pt", lambda saved: saved["rng"].pop("numpy") and None)),
    "python's generator": ("rank0.pt", generators(python=(3, (1, 2), None))),
    "numpy's generator": ("rank0.pt", generators(numpy=["PCG64", torch.zeros(3), 1, 0, 0.0])),
    "torch's generator": ("rank0.pt", generators(torch=torch.zeros(5))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "unsealed"])
def test_each_kind_is_one_line_that_names_the_file(good, trainer, tmp_path, kind, sealed):
    """Sealed: by a foreign program that wrote checksums of its own; unsealed.

    As checkpoints of before checksums are.
    """
    named, change = KINDS[kind]
    folder = tmp_path / "checkpoint-000002"
    shutil.copytree(good, folder)
    change(folder)
    (folder / CHECKSUMS).unlink()
    if sealed:
        seal(folder)
    with pytest.raises(ValueError) as caught:  # the words are looked at below
        checkpoint.load(trainer, choose(trainer.accelerator, str(tmp_path), str(folder)))
    said = str(caught.value)
    assert named in said and "\n" not in said and "; " in said, said


def test_the_checkpoint_itself_is_accepted(good, trainer):
    checkpoint.load(trainer, choose(trainer.accelerator, str(good.parent), "auto"))
    assert trainer.state.step == 2 and trainer.batches.next_row == 4


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rank0.pt", "trainer.json", "tokenizer.json"])
def test_a_flipped_bit_is_named(good, tmp_path, name):
    folder = tmp_path / "checkpoint-000002"
    shutil.copytree(good, folder)
    assert damage(folder) is None
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 4
    (folder / name).write_bytes(content)
    assert damage(folder) == f"{name} differs from its checksum"
    (folder / name).unlink()
    assert damage(folder) == f"{name} is missing"


def test_auto_goes_to_the_newest_whole_one_and_sets_the_damaged_aside(start, tmp_path, capsys):
    flags = {"save_every": 2, "keep": 0, "num_steps": 6}
    assert here(start, tmp_path / "run", **flags) == 0
    weights = tmp_path / "run" / "checkpoint-000006" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-7] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    assert here(start, tmp_path / "run", **flags | {"num_steps": 8}, resume="auto") == 0
    said = capsys.readouterr().out
    assert "checkpoint-000006 is damaged (model.safetensors differs from its checksum)" in said
    assert "checkpoint-000004 at step 4 of 8" in said
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert names == [f"checkpoint-00000{step}" for step in (2, 4, 6)] + [
        "checkpoint-000006.damaged",
        "checkpoint-000008",
    ]


def test_where_no_checkpoint_is_whole_the_run_does_not_silently_start_anew(good, tmp_path, trainer):
    shutil.copytree(good, tmp_path / "checkpoint-000002")
    (tmp_path / "checkpoint-000002" / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="no checkpoint in .* is whole .checkpoint-000002.; start anew without"):
        choose(trainer.accelerator, str(tmp_path), "auto")


def test_a_callbacks_state_of_another_kind_is_one_line(start, tmp_path, capsys):
    assert here(start, tmp_path / "run", num_steps=2) == 0
    folder = tmp_path / "run" / "checkpoint-000002"
    facts(callbacks={"log": {"loss": "x"}})(folder)
    seal(folder)
    assert here(start, tmp_path / "run", num_steps=4, resume="auto") == 2
    said = capsys.readouterr().err
    assert "trainer.json: damaged or not ours" in said and said.count("\n") == 1, said


def test_weights_that_are_not_finite_end_the_run_with_code_1_and_nothing_exported(start, tmp_path, capsys):
    flags = {"save_every": 1, "keep": 0, "num_steps": 3}
    assert here(start, tmp_path / "run", **flags) == 0
    shutil.rmtree(tmp_path / "run" / "final")
    assert here(start, tmp_path / "run", **flags | {"num_steps": 8, "keep_best": True}, resume="auto") == 0
    shutil.rmtree(tmp_path / "run")
    wild = flags | {"num_steps": 4, "scalar_lr": 1e38, "embedding_lr": 1e38}
    assert here(start, tmp_path / "run", **wild) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is not finite, so nothing is saved or exported" in said and "lower learning rates" in said
    assert not (tmp_path / "run" / "final").exists()
    for folder in checkpoint.checkpoints(tmp_path / "run"):
        assert first_not_finite(load_file(folder / "model.safetensors").items()) is None
        assert str(folder) in said


def test_another_architecture_is_told_with_its_folder(good, tmp_path, trainer):
    shutil.copytree(good, tmp_path / "checkpoint-000002")
    config = NanochatConfig(vocab_size=280, hidden_size=128, num_hidden_layers=1, num_attention_heads=2)
    NanochatForCausalLM(config).save_pretrained(tmp_path / "checkpoint-000002")
    with pytest.raises(ValueError, match="another architecture; .* more tensors differ"):
        checkpoint.load(trainer, tmp_path / "checkpoint-000002")
