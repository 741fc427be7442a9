"""The training scripts as users start them: what they refuse, measure, show and leave behind."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from nanochat_hf import NanochatForCausalLM
from nanochat_hf.training.tracking import read_metrics
from tests.support.training import STEPS, here, train, weights


def test_plan_and_dry_run_and_smoke_test_write_nothing(start, tmp_path):
    runs = [
        train(start, tmp_path / name, tmp_path / f"{name}.log", **{name: True})
        for name in ("plan_only", "dry_run", "smoke_test")
    ]
    for run in runs:
        assert run.wait() == [0], run.text()
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []
    plan, dry, smoke = (run.text() for run in runs)
    assert "padding" in plan and "step 1/" not in plan
    assert f"step {STEPS}/{STEPS}" in dry and "bpb" in dry
    assert "step 5/5" in smoke and "1 rows × 128 positions" in smoke


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"epochs": -1}, "--epochs -1.0 must be above 0"),
        ({"max_grad_norm": 0}, "--max-grad-norm 0.0 must be above 0"),
        ({"report_to": "trackio"}, "--report-to trackio: the package is not installed"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(start, tmp_path, changed, reason):
    if "report_to" in changed and importlib.util.find_spec("trackio"):
        pytest.skip("trackio is installed")
    run = train(start, tmp_path / "run", tmp_path / "log", **changed)
    assert run.wait() == [2] and reason in run.text() and "Traceback" not in run.text(), run.text()


def test_rows_longer_than_the_models_positions_and_validation_on_the_training_data_are_said(start, tmp_path):
    run = train(start, tmp_path / "run", tmp_path / "log", max_seq_len=128, total_batch_size=None, plan_only=True)
    assert (
        run.wait() == [0]
        and "--max-seq-len 128 exceeds the 64 positions" in run.text()
        and "the training data itself" in run.text()
    ), run.text()


def test_gradients_that_stay_non_finite_end_the_run_with_a_name(start, tmp_path):
    model = NanochatForCausalLM.from_pretrained(start / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(start / "model").save_pretrained(tmp_path / "model")
    run = train(start, tmp_path / "run", tmp_path / "log", model=tmp_path / "model", max_skipped=3, save_every=0)
    assert run.wait() == [2], run.text()
    assert "not finite in 3 steps in a row" in run.text() and ".weight" in run.text() and "Traceback" not in run.text()


def test_trackers_get_stable_names_and_a_resumed_run_is_the_same_run(start, tmp_path):
    pytest.importorskip("wandb")
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    first = train(start, tmp_path / "run", tmp_path / "log", num_steps=3, report_to="wandb", environment=environment)
    assert first.wait() == [0], first.text()
    run_id = json.loads((tmp_path / "run" / "checkpoint-000003" / "trainer.json").read_text())["trackers"]["wandb"]
    again = train(
        start,
        tmp_path / "run",
        tmp_path / "log2",
        num_steps=4,
        report_to="wandb",
        resume="auto",
        environment=environment,
    )
    assert again.wait() == [0], again.text()
    folders = [p.name for p in (tmp_path / "wandb").glob("offline-run-*")]
    assert folders and all(name.endswith(run_id) for name in folders)
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")
    names = {name for entry in last for name in entry}
    assert {
        "train/loss",
        "train/lr_multiplier",
        "train/tokens_per_second",
        "train/tokens",
        "val/bpb",
        "grad_norm/unembedding",
    } <= names
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["torch_version"] == torch.__version__ and config["num_steps"] == 4 and "git_revision" in config


def test_best_and_samples_and_report(start, tmp_path):
    run = train(start, tmp_path / "run", tmp_path / "log", eval_every=2, keep_best=True, sample_every=4, num_steps=12)
    assert run.wait() == [0], run.text()
    assert (
        run.text().index("step 10/12") > 0 and "s a step, about" in run.text()
    )  # the estimate, once ten steps are known
    assert run.text().index("saved") < run.text().index("step 2: validation")  # work is safe before evaluation starts
    NanochatForCausalLM.from_pretrained(tmp_path / "run" / "best")
    report = (tmp_path / "run" / "report.md").read_text()
    assert (
        "minimum validation bpb" in report
        and "elephant" in report
        and (tmp_path / "run" / "curves.png").stat().st_size > 5000
    )


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


@pytest.mark.parametrize("rows, world", [(6, 2), (7, 2), (8, 3), (1, 3)])
def test_validation_rows_are_dealt_out_once_and_equally_many(rows, world):
    from nanochat_hf.training.callbacks.evaluate import divided

    ids = torch.arange(rows).unsqueeze(1).expand(-1, 4)
    batches = [{"input_ids": ids[i : i + 3], "shift_labels": ids[i : i + 3] + 1} for i in range(0, rows, 3)]
    shares = [divided(batches, rank, world) for rank in range(world)]
    assert len({tuple(len(b["input_ids"]) for b in share) for share in shares}) == 1
    counted = [row[0] - 1 for share in shares for b in share for row in b["shift_labels"].tolist() if row[0] != -100]
    assert sorted(counted) == list(range(rows)) and (ids[:, 0] == torch.arange(rows)).all()


def test_bpb_is_the_same_on_two_processes(start, tmp_path):
    changed = {"eval_every": 1, "num_steps": 1, "device_batch_size": 3, "eval_batches": 3}
    runs = [
        train(start, tmp_path / str(w), tmp_path / f"{w}.log", w, **changed, total_batch_size=6 * 64) for w in (1, 2)
    ]
    for world, run in zip((1, 2), runs, strict=True):
        assert run.wait() == [0] * world, run.text()
    one, two = (
        next(e["val/bpb"] for e in read_metrics(tmp_path / str(w) / "metrics.jsonl") if "val/bpb" in e) for w in (1, 2)
    )
    assert two == pytest.approx(one, rel=1e-6)


def test_the_report_counts_rows_that_were_left_out(start, tmp_path):
    rows = (start / "chats.jsonl").read_text() + '{"messages": "no conversation"}\n' * 3
    (tmp_path / "chats.jsonl").write_text(rows)
    assert here(start, tmp_path / "run", data=tmp_path / "chats.jsonl", bad_rows="skip", num_steps=1) == 0
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| bad rows left out | 3 |" in report and "| the first of them | " in report, report
