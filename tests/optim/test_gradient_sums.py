"""Gradients summed over micro-batches by kernels, against those that autograd sums.

On a GPU, or by Triton's interpreter where triton is installed without one; what needs no Triton runs everywhere.
"""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from nanochat_hf import kernels
from nanochat_hf.optim import MuonAdamW, build_param_groups
from nanochat_hf.optim.gradient_sums import gradient_sums
from nanochat_hf.training.trainer import Trainer
from tests.support.kernels import DEVICE, HALF, IDS, TOLERANCE, batch, compiled, relative, tiny, triton, with_kernels


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate remembers the device of the first Accelerator of a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def two_micro_batches(model, call, wanted, dtype=None):
    """Gradients after two passes, the second of other ids, and what was kept."""
    inputs = [batch(DEVICE), batch(DEVICE)]
    inputs[1]["input_ids"] = inputs[1]["input_ids"].flip(1)
    with (
        gradient_sums(kernels.summed(model) if wanted else [], dtype) as kept,
        torch.autocast(DEVICE, torch.bfloat16, enabled=HALF or dtype is not None),
    ):
        if kept:
            kept.refresh()
        for each in inputs:
            call(**each).loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
    return kept, found


@triton
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("compile", [False, True])
def test_a_models_sums_are_autograds(compile, dtype):
    """In half precision a compiled graph rounds elsewhere with sums, most of all in the scalars."""
    model = tiny(DEVICE)
    half = HALF or dtype is not None
    with_kernels(model)
    call = compiled(model) if compile else model
    kept, plain = two_micro_batches(model, call, False, dtype)
    assert not kept
    model.zero_grad()
    for _ in range(2):  # the second time in new tensors
        kept, found = two_micro_batches(model, call, True, dtype)
        assert kept.groups and len(kept.rounded) == (0 if dtype is None else sum(map(len, kept.groups)))
        for name, expected in plain.items():
            assert relative(found[name], expected) < (
                TOLERANCE if not half else 5e-2 if expected.dim() == 1 else 2e-2
            ), name
        assert all(p.grad is None for name, p in model.named_parameters() if "mlp" in name or "value_embeds" in name)
        names = ("main_grad", "joint_grad", "joint_half")
        assert not any(name in vars(p) for p in model.parameters() for name in names)
        model.zero_grad()


@triton
def test_without_its_gradient_a_weight_is_summed_by_autograd():
    """A loop that sets gradients to None, or takes them by torch.autograd.grad, does not lose them."""
    model, inputs = tiny(DEVICE), batch(DEVICE)
    with_kernels(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    (expected,) = torch.autograd.grad(model(**inputs).loss, weight)
    with gradient_sums(kernels.summed(model)):
        model.zero_grad()
        model(**inputs).loss.backward()
        assert relative(weight.grad, expected) < TOLERANCE


@triton
def test_the_sum_of_a_weight_is_its_main_grad_and_its_grad():
    """Under the name that others use; weights that are multiplied together have theirs below one another."""
    model = with_kernels(tiny(DEVICE), "one_product", "squared_relu")
    first = model.model.layers[0]
    with gradient_sums(kernels.summed(model)):
        weight = first.mlp.up_proj.weight
        assert weight.grad is weight.main_grad and weight.joint_grad.data_ptr() == weight.main_grad.data_ptr()
        q, k, v = (layer.weight for layer in (first.self_attn.q_proj, first.self_attn.k_proj, first.self_attn.v_proj))
        k.main_grad.fill_(2.0)
        assert torch.equal(q.joint_grad, torch.cat((q.grad, k.grad, v.grad))) and q.joint_grad.any()
        assert "main_grad" not in vars(model.model.embed_tokens.weight)


@triton
def test_half_and_replaced_weights_have_no_sums_and_models_with_frozen_ones_none():
    model = tiny(DEVICE)
    with_kernels(model)
    first, second, *_ = model.model.layers
    first.mlp.down_proj.to(torch.bfloat16)
    second.mlp.up_proj = torch.nn.Sequential(second.mlp.up_proj)
    with gradient_sums(kernels.summed(model)):
        with_sums = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and "main_grad" in vars(m.weight)]
        assert second.mlp.down_proj in with_sums
        assert not {first.mlp.down_proj, second.mlp.up_proj, second.mlp.up_proj[0]} & set(with_sums)
    second.mlp.down_proj.weight.requires_grad_(False)
    with gradient_sums(kernels.summed(model)) as kept:
        assert kept is None


@triton
def test_rounded_weights_are_those_of_the_last_refresh():
    model, inputs = tiny(DEVICE), batch(DEVICE)
    with_kernels(model)
    with gradient_sums(kernels.summed(model), torch.bfloat16) as kept, torch.autocast(DEVICE, torch.bfloat16):
        kept.refresh()
        before = model(**inputs).loss.item()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.up_proj.weight.mul_(2)
        assert model(**inputs).loss.item() == before
        kept.refresh()
        after = model(**inputs).loss.item()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert after != before and model(**inputs).loss.item() == after


@triton
@pytest.mark.parametrize(
    ("processes", "kind", "steps", "wanted"),
    [(1, "cuda", 2, True), (2, "cuda", 2, False), (1, "cpu", 2, False), (1, "cuda", 1, False)],
)
def test_one_process_with_several_micro_batches_keeps_sums(processes, kind, steps, wanted):
    """Several processes reduce what autograd hands them; of one micro-batch there is no sum."""
    model = tiny(DEVICE)
    with_kernels(model)
    trainer = Trainer.__new__(Trainer)
    trainer.accelerator = SimpleNamespace(num_processes=processes, device=torch.device(kind), mixed_precision="bf16")
    trainer.raw_model, trainer.accumulation = model, steps
    with trainer.gradient_sums() as kept:
        assert bool(kept) == wanted and (not wanted or kept.rounded[0].dtype == torch.bfloat16)


class Batches:
    """Micro-batches without end."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(3)
        while True:
            yield {name: torch.randint(IDS, (2, 32), generator=generator) for name in ("input_ids", "shift_labels")}


def trained(monkeypatch, wanted):
    """Four steps of two micro-batches → (StepInfo of each, weights)."""
    accelerator = Accelerator(
        cpu=DEVICE == "cpu",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False),
    )
    model, seen = tiny(DEVICE), []
    with_kernels(model)
    sums = lambda trainer: gradient_sums(kernels.summed(trainer.raw_model) if wanted else [])  # noqa: E731
    monkeypatch.setattr(Trainer, "gradient_sums", sums)

    def watch(trainer, info):
        assert bool(trainer.sums) == wanted
        seen.append(info)

    optimizer = MuonAdamW(build_param_groups(model), orthogonalize_dtype=torch.float32, compile=False)
    Trainer(
        accelerator,
        model,
        optimizer,
        Batches(),
        num_steps=4,
        schedule=lambda optimizer, step: 1.0,
        norms_every=1,
        callbacks=[watch],
    ).fit()
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    return seen, [parameter.detach() for parameter in model.parameters()]


@triton
def test_training_by_sums_learns_the_same(monkeypatch):
    """Zeroed after each step, with the weights of each step, and as the optimizer and the norms see them."""
    (plain, weights), (ours, found) = (trained(monkeypatch, wanted) for wanted in (False, True))
    for a, b in zip(ours, plain, strict=True):
        assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-2 if HALF else 1e-4)
        assert all(
            a.grad_norms[name].item() == pytest.approx(norm.item(), rel=5e-2 if HALF else 1e-3)
            for name, norm in b.grad_norms.items()
        )
    assert all(relative(a, b) < (5e-2 if HALF else 1e-3) for a, b in zip(found, weights, strict=True))


def test_a_model_without_kernels_keeps_none():
    for each in (tiny(DEVICE), torch.nn.Linear(2, 2)):
        with gradient_sums(kernels.summed(each)) as kept:
            assert kept is None
