"""The twin of a model that FSDP2 has split: whole on every process, and with the weights after each step."""

import torch
import torch.distributed as dist

from nanochat_hf.machine.weights import Twin
from tests.support.models import build, tokens
from tests.support.processes import on_ranks


def split(rank, world, folder):
    """fully_shard on a CPU mesh, which Accelerate itself refuses to do on the CPU."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model, mesh = build().train(), init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    twin, found = Twin(model, torch.float32), []
    for _ in range(2):
        own = twin.refresh()
        if rank == 0:  # alone: what the twin computes is no collective
            found.append(own(tokens(2, 9)).logits)
        model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()


def test_a_split_models_twin_is_the_model_that_one_process_trains(tmp_path):
    on_ranks(split, 2, str(tmp_path))
    model, expected = build().train(), []
    for _ in range(2):
        with torch.no_grad():
            expected.append(model.eval()(tokens(2, 9)).logits)
        model.train()(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    found = torch.load(tmp_path / "0.pt")
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
