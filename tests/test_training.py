"""The training scripts as users start them: they lose no work, go on exactly, refuse what cannot be, and show what they do."""

import importlib.util
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from processes import Run
from safetensors.torch import load_file

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.callbacks import Evaluate
from nanochat_hf.tokenizer import train_tokenizer
from nanochat_hf.tracking import read_metrics

STEPS = 8


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a tiny model and its conversations."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = train_tokenizer(["The cat counted 12 letters, then 7 more."] * 3, 280)
    torch.manual_seed(0)
    config = NanochatConfig(
        vocab_size=280, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    NanochatForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [[{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} " * (i % 7 + 1)}] for i in range(300)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags(start, output, world=1, **changed):
    """Flags of a small run whose batch does not depend on the number of processes."""
    settings = {
        "model": start / "model", "data": start / "chats.jsonl", "output_dir": output, "num_steps": STEPS, "max_seq_len": 64,
        "device_batch_size": 6 // world, "total_batch_size": 6 * 64, "eval_every": 0, "eval_batches": 1, "save_every": 2, "log_every": 1,
        "dtype": "float32",
    } | changed  # fmt: skip
    return [part for name, value in settings.items() if value is not None for part in (f"--{name.replace('_', '-')}", value)]


def train(start, output, log, world=1, environment=None, limit=None, **changed):
    return Run("scripts.chat_sft", flags(start, output, world, **changed), log, world, environment, limit)


def assert_near(ours, expected, limit=3e-2):
    """Norm of the difference ÷ norm of the tensor. Muon's products are bfloat16 here, whose rounding the order of a gradient's sum can tip:
    other rows in a step would show as 0.1 and more (test_optim_distributed.py compares in float32)."""
    apart = {name: ((ours[name] - value).norm() / value.norm()).item() for name, value in expected.items()}
    assert max(apart.values()) < limit, apart


def weights(folder):
    return load_file(folder / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """Uninterrupted runs on 1 and 2 processes."""
    root = tmp_path_factory.mktemp("whole")
    runs = {world: train(start, root / str(world), root / f"{world}.log", world) for world in (1, 2)}
    for world, run in runs.items():
        assert run.wait() == [0] * world, run.text()
    return root


@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_any_moment_it_goes_on_bit_for_bit(start, whole, tmp_path, world):
    dice = random.Random(world)
    output, kills = tmp_path / "run", 0
    for attempt in range(12):
        run = train(start, output, tmp_path / f"{attempt}.log", world, resume="auto", keep=0)
        begun = len(list(output.glob("*checkpoint*")))
        deadline = time.monotonic() + 60
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
    losses = [[e["train/loss"] for e in read_metrics(whole / str(w) / "metrics.jsonl") if "train/loss" in e] for w in (1, 2)]
    # the step's loss, not the weights: bfloat16 products in Muon part them by a rounding or two, which matrices that start at zero magnify
    assert losses[0] == pytest.approx(losses[1], rel=2e-3), losses
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
    deadline = time.monotonic() + 60
    while "step 3/" not in run.text() and time.monotonic() < deadline:
        time.sleep(0.05)
    asked = time.monotonic()
    os.kill(run.processes[-1].pid, signal.SIGTERM)  # one rank is told, all of them stop
    assert run.wait() == [143] * world, run.text()
    assert time.monotonic() - asked < 30
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1 and "--resume auto" in run.text()
    assert not (tmp_path / "run" / "final").exists()


def test_plan_and_dry_run_and_smoke_test_write_nothing(start, tmp_path):
    runs = [train(start, tmp_path / name, tmp_path / f"{name}.log", **{name: True}) for name in ("plan_only", "dry_run", "smoke_test")]
    for run in runs:
        assert run.wait() == [0], run.text()
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []
    plan, dry, smoke = (run.text() for run in runs)
    assert "padding" in plan and "step 1/" not in plan
    assert f"step {STEPS}/{STEPS}" in dry and "bpb" in dry
    assert "step 5/5" in smoke and "1 rows × 128 positions" in smoke


def test_minutes_between_checkpoints(start, tmp_path):
    run = train(start, tmp_path / "run", tmp_path / "log", save_every=0, save_minutes=1e-6, keep=3)
    assert run.wait() == [0], run.text()
    names = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    assert names == [f"checkpoint-{step:06d}" for step in range(STEPS - 2, STEPS + 1)]


def test_a_full_disk_is_one_line_and_older_checkpoints_stay(start, tmp_path):
    assert train(start, tmp_path / "run", tmp_path / "log", num_steps=2).wait() == [0]
    kept = sorted(p.name for p in (tmp_path / "run").iterdir())
    before = (tmp_path / "run" / "checkpoint-000002" / "model.safetensors").read_bytes()
    run = train(start, tmp_path / "run", tmp_path / "log2", num_steps=4, resume="auto", limit=100_000)
    assert run.wait() == [2], run.text()
    assert "could not be written" in run.text() and "Traceback" not in run.text()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == kept
    assert (tmp_path / "run" / "checkpoint-000002" / "model.safetensors").read_bytes() == before


def test_checkpoints_of_another_run_in_the_folder_are_neither_mixed_nor_lost(start, whole, tmp_path):
    shutil.copytree(whole / "1", tmp_path / "run")
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    older = tmp_path / "run" / f"checkpoint-{STEPS - 2:06d}"
    for name, resume, said in (("anew", None, "starts anew"), ("older", older, "goes on from another")):
        run = train(start, tmp_path / "run", tmp_path / name, resume=resume, num_steps=2 * STEPS)
        assert run.wait() == [2] and said in run.text() and "--resume auto" in run.text() and "Traceback" not in run.text(), run.text()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before
    run = train(start, tmp_path / "dry", tmp_path / "dry.log", resume="auto", num_steps=1, dry_run=True)
    assert run.wait() == [0] and "no checkpoint in" in run.text(), run.text()


def test_what_a_resumed_run_does_otherwise_is_said(start, whole, tmp_path):
    newest = whole / "1" / f"checkpoint-{STEPS:06d}"
    run = train(start, tmp_path / "run", tmp_path / "log", resume=newest, matrix_lr=0.01, warmdown_ratio=0.5, num_steps=STEPS + 1)
    assert run.wait() == [0], run.text()
    said = sorted(line for line in run.text().splitlines() if line.startswith("warning: resumed"))
    assert said == [
        "warning: resumed with matrix_lr 0.01, the checkpoint has 0.02; the checkpoint's optimizer holds that, so the flag does nothing",
        "warning: resumed with num_steps 9, the checkpoint has 8",
        "warning: resumed with warmdown_ratio 0.5, the checkpoint has 0.2",
    ]
    last = [e for e in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in e][-1]
    assert last["lr/" + next(n[3:] for n in last if n.startswith("lr/matri"))] == pytest.approx(0.02 * last["train/lr_multiplier"])


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"epochs": -1}, "--epochs -1.0 must be above 0"), ({"max_grad_norm": 0}, "--max-grad-norm 0.0 must be above 0"),
     ({"report_to": "trackio"}, "--report-to trackio: the package is not installed")],
)
def test_flags_that_would_do_nothing_are_refused(start, tmp_path, changed, reason):
    if "report_to" in changed and importlib.util.find_spec("trackio"):
        pytest.skip("trackio is installed")
    run = train(start, tmp_path / "run", tmp_path / "log", **changed)
    assert run.wait() == [2] and reason in run.text() and "Traceback" not in run.text(), run.text()


def test_rows_longer_than_the_models_positions_and_validation_on_the_training_data_are_said(start, tmp_path):
    run = train(start, tmp_path / "run", tmp_path / "log", max_seq_len=128, total_batch_size=None, plan_only=True)
    assert run.wait() == [0] and "--max-seq-len 128 exceeds the 64 positions" in run.text() and "the training data itself" in run.text(), run.text()


def test_damaged_and_foreign_checkpoints_are_named(start, whole, tmp_path):
    newest = whole / "1" / f"checkpoint-{STEPS:06d}"
    cases = {"weights": "damaged", "optimizer": "damaged", "other": "another architecture", "empty": "no whole checkpoint"}
    for case, reason in cases.items():
        folder = tmp_path / case
        shutil.copytree(newest, folder)
        if case == "weights":
            (folder / "model.safetensors").write_bytes(b"\0" * 50)
        elif case == "optimizer":
            (folder / "optimizer.pt").write_bytes(b"cut short")
        elif case == "other":
            NanochatForCausalLM(NanochatConfig(vocab_size=280, hidden_size=128, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(folder)
        else:
            (folder / "trainer.json").unlink()
        run = train(start, tmp_path / "out", tmp_path / f"{case}.log", resume=folder)
        assert run.wait() == [2] and reason in run.text() and "Traceback" not in run.text(), run.text()


def test_gradients_that_stay_non_finite_end_the_run_with_a_name(start, tmp_path):
    model = NanochatForCausalLM.from_pretrained(start / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(start / "model").save_pretrained(tmp_path / "model")
    run = train(start, tmp_path / "run", tmp_path / "log", model=tmp_path / "model", max_skipped=3)
    assert run.wait() == [2], run.text()
    assert "not finite in 3 steps in a row" in run.text() and ".weight" in run.text() and "Traceback" not in run.text()


def test_trackers_get_stable_names_and_a_resumed_run_is_the_same_run(start, tmp_path):
    pytest.importorskip("wandb")
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    first = train(start, tmp_path / "run", tmp_path / "log", num_steps=3, report_to="wandb", environment=environment)
    assert first.wait() == [0], first.text()
    run_id = json.loads((tmp_path / "run" / "checkpoint-000003" / "trainer.json").read_text())["trackers"]["wandb"]
    again = train(start, tmp_path / "run", tmp_path / "log2", num_steps=4, report_to="wandb", resume="auto", environment=environment)
    assert again.wait() == [0], again.text()
    folders = [p.name for p in (tmp_path / "wandb").glob("offline-run-*")]
    assert folders and all(name.endswith(run_id) for name in folders)
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")
    names = {name for entry in last for name in entry}
    assert {"train/loss", "train/lr_multiplier", "train/tokens_per_second", "train/tokens", "val/bpb", "grad_norm/unembedding"} <= names
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["torch_version"] == torch.__version__ and config["num_steps"] == 4 and "git_revision" in config


def test_best_and_samples_and_report(start, tmp_path):
    run = train(start, tmp_path / "run", tmp_path / "log", eval_every=2, keep_best=True, sample_every=4, num_steps=12)
    assert run.wait() == [0], run.text()
    assert run.text().index("step 10/12") > 0 and "s a step, about" in run.text()  # the estimate, once ten steps are known
    assert run.text().index("saved") < run.text().index("step 2: validation")  # work is safe before evaluation starts
    NanochatForCausalLM.from_pretrained(tmp_path / "run" / "best")
    report = (tmp_path / "run" / "report.md").read_text()
    assert "minimum validation bpb" in report and "elephant" in report and (tmp_path / "run" / "curves.png").stat().st_size > 5000


def test_a_resumed_run_knows_what_it_measured_before():
    evaluate = Evaluate([], None, None, every=1, best_dir="best")
    evaluate.remember([{"step": 0, "val/bpb": 3.0}, {"step": 1, "train/loss": 1.0}, {"step": 2, "val/bpb": 1.5}, {"step": 4, "val/bpb": 2.0}])
    assert (evaluate.first, evaluate.best) == (3.0, 1.5)


def test_a_last_step_that_is_the_best_is_kept_as_the_best(start, tmp_path):
    run = train(start, tmp_path / "run", tmp_path / "log", eval_every=2, keep_best=True, keep=0)
    assert run.wait() == [0], run.text()
    measured = {e["step"]: e["val/bpb"] for e in read_metrics(tmp_path / "run" / "metrics.jsonl") if "val/bpb" in e}
    assert min(measured, key=measured.get) == STEPS  # so few steps only get better
    best = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in weights(tmp_path / "run").items())
    # a resumed run reports what was measured before it, though it measures only at its own end
    shutil.rmtree(tmp_path / "run" / f"checkpoint-{STEPS:06d}")
    again = train(start, tmp_path / "run", tmp_path / "log2", resume="auto", keep=0)
    assert again.wait() == [0], again.text()
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"| validation bpb before | {measured[0]:,.5g} |" in report, report


def test_streams_on_two_processes_stop_together_and_resume_to_the_same_bits(start, tmp_path):
    changed = {"streaming": True, "device_batch_size": 3, "save_every": 4}
    one = train(start, tmp_path / "run", tmp_path / "log", 2, **changed)
    assert one.wait() == [0, 0], one.text()
    assert "documents" not in one.text()  # nothing is read whole, also not for validation
    assert "1 streams, packed window by window" in one.text() and f"step {STEPS}/{STEPS}" in one.text()
    again = train(start, tmp_path / "again", tmp_path / "log2", 2, **changed, resume=tmp_path / "run" / "checkpoint-000004")
    assert again.wait() == [0, 0], again.text()
    expected = weights(tmp_path / "run")
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "again").items())
    other = train(start, tmp_path / "other", tmp_path / "log3", **changed, resume=tmp_path / "run" / "checkpoint-000004")
    assert other.wait() == [2] and "split over 2 processes, this run has 1; resume with 2" in other.text()
    endless = train(start, tmp_path / "endless", tmp_path / "log4", streaming=True, num_steps=None)
    assert endless.wait() == [2] and "give --num-steps" in endless.text()


@pytest.mark.parametrize("rows, world", [(6, 2), (7, 2), (8, 3), (1, 3)])
def test_validation_rows_are_dealt_out_once_and_equally_many(rows, world):
    from scripts.training import divided

    ids = torch.arange(rows).unsqueeze(1).expand(-1, 4)
    batches = [{"input_ids": ids[i : i + 3], "shift_labels": ids[i : i + 3] + 1} for i in range(0, rows, 3)]
    shares = [divided(batches, rank, world) for rank in range(world)]
    assert len({tuple(len(b["input_ids"]) for b in share) for share in shares}) == 1
    counted = [row[0] - 1 for share in shares for b in share for row in b["shift_labels"].tolist() if row[0] != -100]
    assert sorted(counted) == list(range(rows)) and (ids[:, 0] == torch.arange(rows)).all()


def test_bpb_is_the_same_on_two_processes(start, tmp_path):
    changed = {"eval_every": 1, "num_steps": 1, "device_batch_size": 3, "eval_batches": 3}
    runs = [train(start, tmp_path / str(w), tmp_path / f"{w}.log", w, **changed, total_batch_size=6 * 64) for w in (1, 2)]
    for world, run in zip((1, 2), runs, strict=True):
        assert run.wait() == [0] * world, run.text()
    one, two = ([e["val/bpb"] for e in read_metrics(tmp_path / str(w) / "metrics.jsonl") if "val/bpb" in e][0] for w in (1, 2))
    assert two == pytest.approx(one, rel=1e-6)
