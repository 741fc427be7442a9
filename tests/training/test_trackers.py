"""Trackers.

One that cannot start is one line before any data is prepared, several work at once, and a resumed run goes on as the
same run.
"""

import contextlib
import json
import sqlite3

import pytest

from nanochat_hf.training.tracking import TrackConfig, read_metrics
from tests.support.training import here, train


def test_flags():
    assert TrackConfig().trackers == ()
    assert TrackConfig(report_to="wandb, tensorboard,wandb").trackers == ("wandb", "tensorboard")
    for unknown in ("mlflow", "none,wandb", ""):
        with pytest.raises(ValueError, match="is unknown; choose wandb, trackio, tensorboard, several with commas"):
            TrackConfig(report_to=unknown)


@pytest.fixture
def wandb():
    """W&B, which otherwise keeps the environment of the test before."""
    module = pytest.importorskip("wandb")
    module.teardown()
    yield module
    module.teardown()


def test_a_tracker_that_cannot_start_is_one_line_before_the_data_and_leaves_nothing(
    start, tmp_path, monkeypatch, capsys, wandb
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb"))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert here(start, tmp_path / "run", report_to="wandb") == 2
    said = capsys.readouterr()
    line = said.err.strip().splitlines()[-1]
    assert line.startswith("error: --report-to wandb: cannot start (") and "run `wandb login`" in line
    assert "documents" not in said.out and "Traceback" not in said.err and not (tmp_path / "run").exists()


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_several_trackers_at_once_and_a_resumed_run_logs_each_step_once(start, tmp_path, monkeypatch, wandb):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags = {"report_to": "wandb,tensorboard", "save_every": 2, "keep": 0, "num_steps": 6}
    assert here(start, tmp_path / "run", **flags) == 0
    first = json.loads((tmp_path / "run" / "checkpoint-000004" / "trainer.json").read_text())["trackers"]
    # as if killed after step 5: steps 5 and 6 are in TensorBoard's file and in no checkpoint
    (tmp_path / "run" / "checkpoint-000006").rename(tmp_path / "away")
    assert here(start, tmp_path / "run", **flags, resume="auto") == 0
    again = json.loads((tmp_path / "run" / "checkpoint-000006" / "trainer.json").read_text())["trackers"]
    assert again == first and set(first) == {"wandb"}
    board = events(tmp_path / "run" / "nanochat_hf")
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    names = {name for entry in read_metrics(tmp_path / "run" / "metrics.jsonl") for name in entry} - {"step"}
    assert set(board.Tags()["scalars"]) == names
    kinds = {"matrix", "embedding", "unembedding", "value_embeds", "resid_lambdas", "x0_lambdas"}
    for prefix in ("lr/", "grad_norm/"):
        assert {name.removeprefix(prefix) for name in names if name.startswith(prefix)} == kinds


def test_trackio_goes_on_with_its_run(start, tmp_path):
    """In processes of their own, since trackio learns its folder when it is imported."""
    pytest.importorskip("trackio")
    environment = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    flags = {"report_to": "trackio", "save_every": 2, "keep": 0, "run_name": "cats", "resume": "auto"}
    for steps in (2, 4):
        run = train(
            start, tmp_path / "run", tmp_path / f"{steps}.log", environment=environment, num_steps=steps, **flags
        )
        assert run.wait() == [0], run.text()
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "cats.db")) as connection:
        logged = connection.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
    assert len({(identity, name) for identity, name, _, _ in logged}) == 1 and logged[0][1].startswith("run-")
    assert [step for _, _, step, values in logged if b"train/loss" in values] == [1, 2, 3, 4]
