"""--ema: the average of the last steps' weights, the same after a resume, exported where it is better."""

import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nanochat_hf.training.callbacks.average import Average
from nanochat_hf.training.callbacks.evaluate import EvalConfig, Evaluate
from tests.support.models import LATER, build, tokens
from tests.support.processes import on_ranks
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


def split_over_processes(rank, world, folder):
    """A model with all parts, split by FSDP2: the average of two steps is that of the whole weights, and comes back."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    whole, model = build(**LATER), build(**LATER)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (world,)))
    ids, trainer, info = tokens(2, 16), SimpleNamespace(raw_model=model), SimpleNamespace(step=1)
    for one in (whole, model):
        one.train()(ids, labels=ids).loss.backward()
    gate = whole.model.smear.gate.weight.grad
    torch.testing.assert_close(model.model.smear.gate.weight.grad.full_tensor(), gate, rtol=1e-4, atol=1e-6)
    average = Average(0.5, 1.0, num_steps=2)
    average(trainer, info)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    average(trainer, info)
    kept = average.weights(trainer)
    if rank == 0:
        assert all(torch.allclose(kept[name], 2 * value) for name, value in whole.state_dict().items())
        torch.save(kept, f"{folder}/kept.pt")
    dist.barrier()
    again = Average(0.5, 1.0, num_steps=2)
    again.load_weights(trainer, torch.load(f"{folder}/kept.pt", weights_only=True))
    for mine, theirs, parameter in zip(again.average, average.average, model.parameters(), strict=True):
        assert torch.equal(mine.to_local(), theirs.to_local())
        assert torch.allclose(parameter.to_local(), 1.5 * mine.to_local())
    dist.destroy_process_group()


def test_a_split_model_is_averaged_part_by_part(tmp_path):
    on_ranks(split_over_processes, 2, str(tmp_path))


@pytest.mark.parametrize(("flag", "value"), [("ema", 1.0), ("ema", -0.1), ("ema_share", 0.0)])
def test_impossible_averages_are_refused(flag, value):
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} {value} must"):
        EvalConfig(**{flag: value})
