"""The model under Accelerate on 1, 2 and 3 processes, and split by FSDP2: 20 steps end at the same parameters."""

import contextlib
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

from nanochat_hf.model import NanochatConfig, NanochatForCausalLM
from nanochat_hf.optim import MuonAdamW, OptimizerConfig, apply_schedule, build_param_groups
from nanochat_hf.training.schedules import muon_momentum
from tests.support.processes import on_ranks

ROWS, POSITIONS, STEPS = 6, 16, 20


def build(layers=4):
    torch.manual_seed(0)
    config = NanochatConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=layers, num_attention_heads=2, max_position_embeddings=16
    )
    model = NanochatForCausalLM(config)
    with torch.no_grad():
        for param in model.parameters():  # no matrix starts at zero, where a gradient is all rounding
            param.add_(torch.randn_like(param) * 0.05)
    return model


# rates at which twenty steps on random targets stay a smooth path: at the usual ones a width of 64 is chaotic, and any
# rounding grows
RATES = OptimizerConfig(embedding_lr=0.001, unembedding_lr=0.0005, matrix_lr=0.001, scalar_lr=0.001, weight_decay=0.1)


def rows(step, rank, world):
    """This rank's rows of the global batch; rows differ in how many targets count."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(300, (ROWS, POSITIONS + 1), generator=generator)
    targets = ids[:, 1:].masked_fill(
        torch.rand(ROWS, POSITIONS, generator=generator) < torch.rand(ROWS, 1, generator=generator), -100
    )
    share = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    return {"input_ids": ids[share, :-1], "shift_labels": targets[share]}, int((targets != -100).sum())


def ddp(rank, world, folder, precision):
    from nanochat_hf.machine.accelerator import build_accelerator
    from nanochat_hf.training.trainer import Trainer

    accelerator = build_accelerator(1, dtype=precision)
    assert accelerator.num_processes == world
    model = build()
    optimizer = MuonAdamW(build_param_groups(model, RATES), orthogonalize_dtype=torch.float32)

    def schedule(wrapped, step):
        apply_schedule(wrapped.optimizer, 1.0, muon_momentum(step))
        return 1.0

    class Batches:
        epoch = 0

        def __iter__(self):
            return (rows(step, rank, world)[0] for step in range(STEPS))

    trainer = Trainer(accelerator, model, optimizer, Batches(), num_steps=STEPS, schedule=schedule)
    assert (type(trainer.model).__name__ == "DistributedDataParallel") == (world > 1)
    trainer.fit()
    if world > 1:  # the group outlives the model: torch can hang in a group's destructor
        group = weakref.ref(trainer.model.process_group)
        accelerator.end_training()
        del trainer.model
        gc.collect()
        assert group() is not None
    held = sum(v.numel() * v.element_size() for values in optimizer.state.values() for v in values.values())
    torch.save(
        {"world": world, "params": dict(model.named_parameters()), "state_bytes": held},
        f"{folder}/result_{rank}.pt",
    )


def fsdp2(rank, world, folder, precision):
    """fully_shard on a CPU mesh, which Accelerate itself refuses to do on the CPU; everything else is as under DDP."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from nanochat_hf.machine.weights import load_whole_weights, whole_weights

    dist.init_process_group("gloo")
    model = build()
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = MuonAdamW(build_param_groups(model, RATES), orthogonalize_dtype=torch.float32)
    for step in range(STEPS):
        batch, targets = rows(step, rank, world)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model.train()(**batch, num_items_in_batch=targets).loss
        (loss * world).backward()  # FSDP2 averages over ranks
        apply_schedule(optimizer, 1.0, muon_momentum(step))
        optimizer.step()
        optimizer.zero_grad()
        if step == STEPS // 2:  # a checkpoint in the middle, written whole and read back
            optimizer.load_state_dict(optimizer.full_state_dict())
            weights = [whole_weights(model)]
            dist.broadcast_object_list(weights)
            load_whole_weights(model, weights[0])
    params = {name: param.full_tensor().detach() for name, param in model.named_parameters()}
    held = sum(
        (v.to_local() if hasattr(v, "to_local") else v).numel() * 4
        for values in optimizer.state.values()
        for v in values.values()
    )
    torch.save({"world": world, "params": params, "state_bytes": held}, f"{folder}/result_{rank}.pt")
    dist.barrier()


def launch(function, world, folder, precision="float32"):
    folder.mkdir()
    on_ranks(function, world, str(folder), precision)
    return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    root = tmp_path_factory.mktemp("alone")
    return {precision: launch(ddp, 1, root / precision, precision)[0] for precision in ("float32", "bfloat16")}


def furthest(ours, expected):
    apart = {name: ((ours[name] - value).norm() / value.norm()).item() for name, value in expected.items()}
    return max(apart.values())


# float32: the order of a sum of gradients is all that differs. bfloat16: activations are rounded by shapes that differ
# with the rows of a rank, each to 2^-9, and twenty steps of a rate of 0.02 carry that into matrices that began at zero.
@pytest.mark.parametrize(
    "function, world, precision, limit",
    [
        (ddp, 2, "float32", 1e-5),
        (ddp, 3, "float32", 1e-5),
        (ddp, 2, "bfloat16", 0.05),
        (fsdp2, 2, "float32", 1e-5),
    ],
)
def test_twenty_steps_end_where_one_process_ends(alone, tmp_path, function, world, precision, limit):
    results = launch(function, world, tmp_path / "run", precision)
    expected = alone[precision]
    assert [result["world"] for result in results] == [world] * world
    for result in results:
        assert all(torch.equal(value, results[0]["params"][name]) for name, value in result["params"].items())
        assert furthest(result["params"], expected["params"]) < limit
        assert result["state_bytes"] < expected["state_bytes"] / world * 1.3
    print(
        f"state of the optimizer: {expected['state_bytes']} bytes alone, "
        f"{[r['state_bytes'] for r in results]} on {world} ranks"
    )


def compiled_and_split(rank, world, folder, precision):
    """The model with its layers compiled, then split, as under Accelerate's FSDP2; evaluated between steps."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from nanochat_hf.machine.compiling import compile_layers
    from nanochat_hf.training.callbacks.base import evaluating

    dist.init_process_group("gloo")
    model, mesh = build(2), init_device_mesh("cpu", (world,))
    compiled = CompileCounterWithBackend("aot_eager")
    compile_layers(model.model.layers, compiled)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    trainer = SimpleNamespace(
        model=model, raw_model=model, accelerator=SimpleNamespace(autocast=contextlib.nullcontext)
    )
    losses = []
    for step in range(3):
        batch, targets = rows(step, rank, world)
        with torch.no_grad(), evaluating(trainer) as whole:
            losses.append(whole(**batch, num_items_in_batch=targets).loss.item())
        assert model.training and all(hasattr(p, "full_tensor") for p in model.model.layers.parameters())
        frames = compiled.frame_count
        loss = model(**batch, num_items_in_batch=targets).loss
        assert (
            compiled.frame_count == frames if step else compiled.frame_count > frames == 0
        )  # in training alone, and once
        assert abs(loss.item() - losses[-1]) < 1e-5 * losses[-1]
        loss.backward()
        for parameter in model.parameters():
            parameter.data.sub_(parameter.grad, alpha=0.1)
            parameter.grad = None
    torch.save({"losses": losses}, f"{folder}/result_{rank}.pt")
    dist.barrier()


def test_a_model_compiled_and_split_is_evaluated_between_steps(tmp_path):
    for result in launch(compiled_and_split, 2, tmp_path / "run"):
        assert len(set(result["losses"])) == 3
