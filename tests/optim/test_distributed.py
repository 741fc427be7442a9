"""MuonAdamW on 1 to 4 gloo processes: equal parameters, divided state, one state for any number of processes."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nanochat_hf.optim import MuonAdamW
from tests.support.processes import on_ranks

SHAPES = (
    [(8, 4)] * 5 + [(4, 8)] + [(301, 64), (4,)]
)  # 5, 1 and 301 do not divide by 2, 3 or 4; of one matrix some processes own none
MISSING = 2  # this matrix has no gradient at step 1
STEPS = 4


def make(bare_params=None):
    generator = torch.Generator().manual_seed(0)
    params = bare_params or [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in SHAPES]
    groups = [
        {"kind": "muon", "params": params[:5], "lr": 0.02, "weight_decay": 0.1},
        {"kind": "muon", "params": params[5:6], "lr": 0.02},
        {"kind": "adamw", "params": params[6:], "lr": 0.01, "weight_decay": 0.1},
    ]
    return params, MuonAdamW(groups, orthogonalize_dtype=torch.float32)


def run_steps(params, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        if step == 1:
            params[MISSING].grad = None
        if step == 2 and dist.get_rank() == dist.get_world_size() - 1:
            params[7].grad[0] = float("nan")  # on one process only: all must skip
        optimizer.step()


def start(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    assert dist.get_world_size() == world


def train(rank, world, folder, resume_from):
    """Either train from the start and save, or resume from another world's state at step 3; write what results."""
    start(rank, world, folder)
    params, optimizer = make()
    if resume_from is None:
        run_steps(params, optimizer, range(STEPS - 1))
        middle = {"optimizer": optimizer.full_state_dict(), "params": [p.detach().clone() for p in params]}
        assert (optimizer.full_state_dict(rank0_only=True) is None) == (rank > 0)
        local = optimizer.state_dict()
        optimizer.load_state_dict(local)  # its own share loads
        if rank == 0:
            torch.save(middle, f"{folder}/middle.pt")
    else:
        saved = torch.load(f"{resume_from}/middle.pt", weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        for param, value in zip(params, saved["params"], strict=True):
            param.data.copy_(value)
    run_steps(params, optimizer, range(STEPS - 1, STEPS))
    result = {
        "world": dist.get_world_size(),
        "params": [param.detach() for param in params],
        "state": optimizer.full_state_dict(),
        "elements": sum(value.numel() for values in optimizer.state.values() for value in values.values()),
        "skipped": optimizer.skipped_steps,
    }
    torch.save(result, f"{folder}/result_{rank}.pt")


def launch(function, world, folder, *args):
    folder.mkdir()
    on_ranks(function, world, str(folder), *args)
    return [torch.load(folder / f"result_{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return root, {world: launch(train, world, root / f"world{world}", None) for world in (1, 2, 3, 4)}


def assert_same(ours, expected):
    for a, b in zip(ours["params"], expected["params"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert ours["state"]["state"].keys() == expected["state"]["state"].keys()
    for i, values in expected["state"]["state"].items():
        for key, value in values.items():
            torch.testing.assert_close(ours["state"]["state"][i][key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_processes_gives_the_same_step(runs, world):
    _, results = runs
    alone = results[1][0]
    assert len(results[world]) == world and all(result["world"] == world for result in results[world])
    for result in results[world]:
        assert_same(result, alone)
        assert result["skipped"] == alone["skipped"] == 1
        for a, b in zip(result["params"], results[world][0]["params"], strict=True):
            assert torch.equal(a, b)  # the owner's bits, everywhere


@pytest.mark.parametrize("world", [2, 3, 4])
def test_state_is_divided(runs, world):
    _, results = runs
    alone = results[1][0]["elements"]
    for result in results[world]:
        assert result["elements"] <= alone / world * 1.05 + 64
    assert sum(result["elements"] for result in results[world]) < alone * 1.01


@pytest.mark.parametrize("before, after", [(2, 1), (2, 3), (2, 4), (3, 1)])
def test_state_moves_to_another_number_of_processes(runs, before, after):
    root, results = runs
    folder = root / f"moved_{before}_{after}"
    for result in launch(train, after, folder, str(root / f"world{before}")):
        assert result["world"] == after
        assert_same(result, results[1][0])


def fsdp(rank, world, folder):
    """The same updates on DTensors, split by fully_shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    start(rank, world, folder)
    plain, reference = make()
    holder = nn.Module()
    holder.items = nn.ParameterList([nn.Parameter(param.detach().clone()) for param in plain])
    fully_shard(holder, mesh=init_device_mesh("cpu", (world,)))
    split = list(holder.parameters())
    assert all(isinstance(param, DTensor) for param in split)
    _, optimizer = make(split)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for param, other in zip(plain, split, strict=True):
            param.grad = torch.randn(param.shape, generator=generator)
            other.grad = distribute_tensor(param.grad.clone(), other.device_mesh, other.placements)
        reference.step()
        optimizer.step()
        if step == 1:
            optimizer.load_state_dict(optimizer.full_state_dict())
    expected, full = reference.full_state_dict(), optimizer.full_state_dict()
    for i, values in expected["state"].items():
        for key, value in values.items():
            torch.testing.assert_close(full["state"][i][key], value, rtol=1e-5, atol=1e-6)
    for param, other in zip(plain, split, strict=True):
        torch.testing.assert_close(other.full_tensor().detach(), param.detach(), rtol=1e-5, atol=1e-6)
    torch.save({"world": dist.get_world_size()}, f"{folder}/result_{rank}.pt")


def test_fsdp2_parameters_get_the_same_updates(tmp_path):
    assert [result["world"] for result in launch(fsdp, 2, tmp_path / "fsdp")] == [2, 2]
