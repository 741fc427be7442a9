"""Training stopped, killed and resumed as users do it.

No work is lost, it goes on exactly, and what cannot be is refused.
"""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch

from nanochat_hf.training.integrity import seal
from nanochat_hf.training.tracking import read_metrics
from tests.support.training import STEPS, here, train, weights


def assert_near(ours, expected, limit=3e-2):
    """Norm of the difference ÷ norm of the tensor.

    Muon's products are bfloat16 here, whose rounding the order of a gradient's sum can tip: other rows in a step would
    show as 0.1 and more (test_optim_distributed.py compares in float32).
    """
    apart = {name: ((ours[name] - value).norm() / value.norm()).item() for name, value in expected.items()}
    assert max(apart.values()) < limit, apart


@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_any_moment_it_goes_on_bit_for_bit(start, whole, tmp_path, world):
    dice = random.Random(world)
    output, kills = tmp_path / "run", 0
    for attempt in range(12):
        run = train(start, output, tmp_path / f"{attempt}.log", world, resume="auto", keep=0)
        begun = len(list(output.glob("*checkpoint*")))
        deadline = time.monotonic() + 240
        reached = dice.choice((f"1/{STEPS}", f"3/{STEPS}"))
        while attempt == 0 and any(p.is_alive() for p in run.processes) and time.monotonic() < deadline:
            if f"step {reached}" in run.text():  # between two checkpoints
                run.kill()
                kills += 1
                break
            time.sleep(0.002)
        # the next ones die while a checkpoint is being written, or a moment after
        while 0 < attempt < 4 and any(p.is_alive() for p in run.processes) and time.monotonic() < deadline:
            if len(list(output.glob("*checkpoint*"))) > begun or list(output.glob(".*partial")):
                time.sleep(dice.random() * 0.05)
                run.kill()
                kills += 1
                break
            time.sleep(0.002)
        if run.wait() == [0] * world:
            break
    assert kills >= 3 and (output / "final").is_dir(), run.text()
    expected = weights(whole / str(world))
    assert all(torch.equal(value, expected[name]) for name, value in weights(output).items())
    steps = [entry["step"] for entry in read_metrics(output / "metrics.jsonl") if "train/loss" in entry]
    assert steps == list(range(1, STEPS + 1))  # no step twice in the log either


def test_two_processes_train_the_same_model_as_one(whole):
    losses = [
        [e["train/loss"] for e in read_metrics(whole / str(w) / "metrics.jsonl") if "train/loss" in e] for w in (1, 2)
    ]
    # the step's loss, not the weights: bfloat16 products in Muon part them by a rounding or two, which matrices that
    # start at zero magnify, from 2e-4 in the second step to some 3e-3 in the last
    assert losses[0][:3] == pytest.approx(losses[1][:3], rel=1e-3) and losses[0] == pytest.approx(
        losses[1], rel=1e-2
    ), losses
    saved = json.loads((whole / "2" / f"checkpoint-{STEPS:06d}" / "trainer.json").read_text())
    assert saved["num_processes"] == 2 and (whole / "2" / f"checkpoint-{STEPS:06d}" / "rank1.pt").is_file()


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2), (2, 3)])
def test_a_checkpoint_moves_to_another_number_of_processes(start, whole, tmp_path, before, after):
    output = tmp_path / "run"
    run = train(start, output, tmp_path / "log", after, resume=whole / str(before) / f"checkpoint-{STEPS - 2:06d}")
    assert run.wait() == [0] * after, run.text()
    assert f"at step {STEPS - 2} of {STEPS}" in run.text()
    assert_near(weights(output), weights(whole / str(before)))


@pytest.mark.parametrize("world", [1, 2])
def test_a_stop_signal_saves_and_says_so(start, tmp_path, world):
    run = train(start, tmp_path / "run", tmp_path / "log", world, num_steps=100000, save_every=0)
    deadline = time.monotonic() + 240
    while "step 3/" not in run.text() and time.monotonic() < deadline:
        time.sleep(0.05)
    asked = time.monotonic()
    os.kill(run.processes[-1].pid, signal.SIGTERM)  # one rank is told, all of them stop
    assert run.wait() == [143] * world, run.text()
    assert time.monotonic() - asked < 30
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1 and "--resume auto" in run.text()
    assert not (tmp_path / "run" / "final").exists()


def test_minutes_between_checkpoints(start, tmp_path):
    run = train(start, tmp_path / "run", tmp_path / "log", save_every=0, save_minutes=1e-6, keep=3)
    assert run.wait() == [0], run.text()
    names = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    assert names == [f"checkpoint-{step:06d}" for step in range(STEPS - 2, STEPS + 1)]


@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_is_one_line_and_older_checkpoints_stay(start, tmp_path, world):
    assert here(start, tmp_path / "run", num_steps=2) == 0
    kept = sorted(p.name for p in (tmp_path / "run").iterdir())
    before = (tmp_path / "run" / "checkpoint-000002" / "model.safetensors").read_bytes()
    run = train(start, tmp_path / "run", tmp_path / "log", world, num_steps=4, resume="auto", limit=100_000)
    assert run.wait() == [2] * world, run.text()
    assert run.text().count("could not be written") == 1 and "Traceback" not in run.text(), run.text()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == kept
    assert (tmp_path / "run" / "checkpoint-000002" / "model.safetensors").read_bytes() == before


def test_checkpoints_of_another_run_in_the_folder_are_neither_mixed_nor_lost(start, whole, tmp_path):
    shutil.copytree(whole / "1", tmp_path / "run")
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    older = tmp_path / "run" / f"checkpoint-{STEPS - 2:06d}"
    for name, resume, said in (("anew", None, "starts anew"), ("older", older, "goes on from another")):
        run = train(start, tmp_path / "run", tmp_path / name, resume=resume, num_steps=2 * STEPS)
        assert (
            run.wait() == [2] and said in run.text() and "--resume auto" in run.text() and "Traceback" not in run.text()
        ), run.text()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before
    run = train(start, tmp_path / "dry", tmp_path / "dry.log", resume="auto", num_steps=1, dry_run=True)
    assert run.wait() == [0] and "no checkpoint in" in run.text(), run.text()


def test_what_a_resumed_run_does_otherwise_is_said_and_config_json_shows_what_is_in_force(start, tmp_path, capsys):
    assert here(start, tmp_path / "first", num_steps=2) == 0
    newest = tmp_path / "first" / "checkpoint-000002"
    facts = json.loads((newest / "trainer.json").read_text())
    facts["settings"]["mixed_precision"] = "bf16"
    (newest / "trainer.json").write_text(json.dumps(facts))
    seal(newest)
    capsys.readouterr()
    flags = {"matrix_lr": 0.01, "warmdown_ratio": 0.5, "num_steps": 3, "resume": newest}
    assert here(start, tmp_path / "run", **flags) == 0
    said = sorted(line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: resumed"))
    assert said == [
        "warning: resumed with matrix_lr 0.01, the checkpoint has 0.02; "
        "the checkpoint's optimizer holds that, so the flag does nothing",
        "warning: resumed with mixed_precision no, the checkpoint has bf16",
        "warning: resumed with num_steps 3, the checkpoint has 2",
        "warning: resumed with warmdown_ratio 0.5, the checkpoint has 0.2",
    ]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["matrix_lr"], config["warmdown_ratio"], config["mixed_precision"]) == (0.02, 0.5, "no")
    last = [e for e in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in e][-1]
    rate = last["lr/matrix"]
    assert rate == pytest.approx(config["matrix_lr"] * last["train/lr_multiplier"])


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"matrix_optimizer": "adamw"}, "--matrix-optimizer adamw: the checkpoint was trained with muon; resume with"),
        ({"num_steps": 1}, "--num-steps 1 is below the 2 steps of"),
    ],
)
def test_flags_that_cannot_take_effect_are_refused(start, tmp_path, capsys, changed, reason):
    assert here(start, tmp_path / "run", num_steps=2) == 0
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert here(start, tmp_path / "run", **{"num_steps": 4, "resume": "auto"} | changed) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: {reason}"), said
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_streams_on_two_processes_stop_together_and_resume_to_the_same_bits(start, tmp_path):
    changed = {"streaming": True, "device_batch_size": 3, "save_every": 4}
    one = train(start, tmp_path / "run", tmp_path / "log", 2, **changed)
    assert one.wait() == [0, 0], one.text()
    assert "documents" not in one.text()  # nothing is read whole, also not for validation
    assert "1 streams, packed window by window" in one.text() and f"step {STEPS}/{STEPS}" in one.text()
    again = train(
        start, tmp_path / "again", tmp_path / "log2", 2, **changed, resume=tmp_path / "run" / "checkpoint-000004"
    )
    assert again.wait() == [0, 0], again.text()
    expected = weights(tmp_path / "run")
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "again").items())
    other = train(
        start, tmp_path / "other", tmp_path / "log3", **changed, resume=tmp_path / "run" / "checkpoint-000004"
    )
    assert other.wait() == [2] and "split over 2 processes, this run has 1; resume with 2" in other.text()
    endless = train(start, tmp_path / "endless", tmp_path / "log4", streaming=True, num_steps=None)
    assert endless.wait() == [2] and "give --num-steps" in endless.text()
