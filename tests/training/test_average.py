"""--ema: the average of the last steps' weights, the same after a resume, exported where it is better."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from nanochat_hf.training.callbacks.evaluate import EvalConfig, Evaluate
from tests.support.training import STEPS, here, weights

SETTINGS = dict(ema=0.75, ema_share=0.5, save_every=1, keep=0)


@pytest.fixture(scope="module")
def averaged(start, tmp_path_factory):
    """A run that keeps every step's weights."""
    output = tmp_path_factory.mktemp("averaged") / "run"
    assert here(start, output, **SETTINGS) == 0
    return output


def ema(run, step=STEPS):
    return torch.load(run / f"checkpoint-{step:06d}" / "ema.pt", weights_only=True)


def test_the_average_is_that_of_the_last_half(averaged):
    steps = [load_file(averaged / f"checkpoint-{step:06d}" / "model.safetensors") for step in (5, 6, 7, 8)]
    assert not (averaged / "checkpoint-000004" / "ema.pt").exists()
    found = ema(averaged)
    assert found.keys() == steps[0].keys()
    for name, value in found.items():
        expected = steps[0][name].double()
        for later in steps[1:]:
            expected = 0.75 * expected + 0.25 * later[name].double()
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)


def test_a_resumed_run_has_the_same_average(start, averaged, tmp_path):
    shutil.copytree(averaged, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-000007", "checkpoint-000008"))
    assert here(start, tmp_path / "run", **SETTINGS, resume="auto") == 0
    whole, resumed = ema(averaged), ema(tmp_path / "run")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    last, again = (run / f"checkpoint-{STEPS:06d}" / "model.safetensors" for run in (averaged, tmp_path / "run"))
    assert last.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("better", [True, False])
def test_the_better_weights_are_exported(start, averaged, tmp_path, monkeypatch, capsys, better):
    measured = iter([2.0, 1.9 if better else 2.1])
    monkeypatch.setattr(Evaluate, "bpb", lambda self, trainer: next(measured))
    assert here(start, tmp_path / "run", **SETTINGS | dict(save_every=0)) == 0
    run = tmp_path / "run"
    chosen = ema(run) if better else load_file(run / f"checkpoint-{STEPS:06d}" / "model.safetensors")
    exported = weights(run)
    assert all(torch.equal(value, chosen[name][: len(value)]) for name, value in exported.items())
    said = capsys.readouterr().out
    assert f"the {'averaged' if better else 'last'} are exported" in said
    assert "validation bpb of the averaged weights" in (run / "report.md").read_text()


@pytest.mark.parametrize(("flag", "value"), [("ema", 1.0), ("ema", -0.1), ("ema_share", 0.0)])
def test_impossible_averages_are_refused(flag, value):
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} {value} must"):
        EvalConfig(**{flag: value})
