"""A run that was killed, wherever, and resumed shows, keeps and reports what the uninterrupted one does."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from nanochat_hf.training import exporting
from nanochat_hf.training.callbacks import evaluate, sample
from nanochat_hf.training.tracking import read_metrics
from nanochat_hf.training.trainer import Trainer
from tests.support.training import here

FLAGS = {
    "eval_every": 2,
    "save_every": 4,
    "num_steps": 12,
    "keep_best": True,
    "sample_every": 4,
    "eval_batches": 2,
}
OF_TIME = ("seconds", "per_second", "mfu")


class Killed(BaseException):
    """Ends a run where a kill would, with nothing said or saved."""


def shown(folder):
    """metrics.jsonl, time and speed aside."""
    entries = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in e.items() if not key.endswith(OF_TIME)} for e in entries]


def reported(folder):
    """Results in report.md, time and speed aside."""
    lines = (folder / "report.md").read_text().partition("## Settings")[0].splitlines()
    return [line for line in lines if line.startswith("|") and "seconds" not in line and "tok/s" not in line]


@pytest.fixture(scope="module", autouse=True)
def turning():
    """Validation that falls and rises again, so that the best model is neither the first nor the last."""
    real = evaluate.evaluate_bpb
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "evaluate_bpb", lambda *args, **more: 1 + abs(real(*args, **more) - 3.3))
        yield


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert here(start, folder, **FLAGS) == 0
    measured = {entry["step"]: entry["val/bpb"] for entry in shown(folder) if "val/bpb" in entry}
    assert list(measured) == [0, 2, 4, 6, 8, 10, 12]
    assert min(measured, key=measured.get) not in (0, 12), measured
    return folder


def dying(call, number):
    """`call`, but for its `number`-th time (from 1), at which the run is killed."""
    calls = []

    def wrapped(*args, **more):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return call(*args, **more)

    return wrapped


PLACES = [
    *((evaluate, "evaluate_bpb", number) for number in range(1, 8)),  # of step 0, 2, 4, …
    *((evaluate, "export_model", number) for number in (1, 2, 3)),
    *((sample, "Engine", number) for number in (1, 3)),
    *((Trainer, "step", number) for number in (3, 5, 6, 7, 8, 12)),
    (exporting, "export", 4),
]


@pytest.mark.parametrize(("owner", "name", "number"), PLACES)
def test_killed_anywhere_and_resumed_it_equals_the_uninterrupted(
    start, uninterrupted, tmp_path, monkeypatch, owner, name, number
):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, dying(getattr(owner, name), number))
        here(start, tmp_path / "run", **FLAGS)
    assert here(start, tmp_path / "run", **FLAGS, resume="auto") == 0
    assert shown(tmp_path / "run") == shown(uninterrupted)
    assert reported(tmp_path / "run") == reported(uninterrupted)
    assert (tmp_path / "run" / "samples.md").read_text() == (uninterrupted / "samples.md").read_text()
    for part in ("best", "final"):
        ours, theirs = (load_file(folder / part / "model.safetensors") for folder in (tmp_path / "run", uninterrupted))
        assert all(torch.equal(ours[name], value) for name, value in theirs.items()), part
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == sorted(path.name for path in uninterrupted.iterdir())


def test_best_is_the_reported_minimum_though_the_resumed_run_never_reaches_it_again(
    start, tmp_path, monkeypatch, capsys
):
    """Killed after the best model was kept, at a step that no checkpoint has, and worse from then on."""
    real = evaluate.evaluate_bpb
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(evaluate, "evaluate_bpb", lambda *a, **k: real(*a, **k) - (3 if steps() == 6 else 0))
        patch.setattr(Trainer, "step", dying(Trainer.step, 8))

        def steps():
            return max((e["step"] for e in read_metrics(tmp_path / "run" / "metrics.jsonl")), default=0)

        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").write_text("")
        here(start, tmp_path / "run", **FLAGS)
    kept = json.loads((tmp_path / "run" / "best" / evaluate.NOTE).read_text())
    assert kept["step"] == 6
    assert here(start, tmp_path / "run", **FLAGS, resume="auto") == 0
    assert json.loads((tmp_path / "run" / "best" / evaluate.NOTE).read_text()) == kept
    assert f"| minimum validation bpb | {kept['val/bpb']:,.5g} |" in reported(tmp_path / "run")


def test_a_best_model_that_is_gone_is_replaced_by_the_best_from_there_on(start, tmp_path):
    assert here(start, tmp_path / "run", **FLAGS | {"keep_best": False, "num_steps": 4}) == 0
    assert here(start, tmp_path / "run", **FLAGS | {"num_steps": 8}, resume="auto") == 0
    measured = {e["step"]: e["val/bpb"] for e in shown(tmp_path / "run") if "val/bpb" in e and e["step"] >= 4}
    note = json.loads((tmp_path / "run" / "best" / evaluate.NOTE).read_text())
    assert note["val/bpb"] == min(measured.values()) and math.isfinite(note["val/bpb"])
    assert f"| minimum validation bpb | {note['val/bpb']:,.5g} |" in reported(tmp_path / "run")


def test_generators_are_as_in_the_uninterrupted_run_with_data_workers_too(start, tmp_path):
    flags = {"save_every": 2, "keep": 0, "num_steps": 4, "num_workers": 1}
    assert here(start, tmp_path / "whole", **flags) == 0
    earlier = tmp_path / "whole" / "checkpoint-000002"
    assert here(start, tmp_path / "again", **flags, resume=earlier) == 0
    states = [
        torch.load(tmp_path / name / "checkpoint-000004" / "rank0.pt", weights_only=True)["rng"]
        for name in ("whole", "again")
    ]
    assert torch.equal(states[0]["torch"], states[1]["torch"])
    assert states[0]["python"] == states[1]["python"]
    assert torch.equal(states[0]["numpy"][1], states[1]["numpy"][1])
