"""Gradients that kernels add up over micro-batches, against those that autograd sums. On a GPU, or by Triton's interpreter where triton is installed
without one; what needs no Triton runs everywhere."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from nanochat_hf import kernels
from nanochat_hf.kernels import cudnn_products, sums
from nanochat_hf.kernels.mlp import SquaredReluMLP
from nanochat_hf.optim import MuonAdamW, build_param_groups
from nanochat_hf.training.trainer import Trainer
from tests.kernels.test_kernels import DEVICE, IDS, batch, compiled, relative, tiny, triton
from tests.kernels.test_kernels_gradients import HALF, KIND, TOLERANCE, randoms
from tests.kernels.test_kernels_layer import leaves, projected


def summed(function, tensors, weights, **sums_given):
    """Gradients of `tensors` in `function`, those at `weights` from the sums, which begin as ones."""
    ours = leaves(*tensors)
    out = function(*ours, **sums_given)
    generator = torch.Generator().manual_seed(1)
    outs = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(outs, [torch.randn(o.shape, generator=generator).to(o) for o in outs])
    assert not sums_given or all(ours[i].grad is None for i in weights)
    return [t.grad for t in ours]


@pytest.mark.parametrize("shape", [(70, 64), (256, 1280) if HALF else (20, 16)])
def test_the_mlp_adds_to_its_sums(shape):
    N, C = shape
    tensors = randoms((N, C), (4 * C, C), (C, 4 * C))
    dx, d_up, d_down = summed(SquaredReluMLP.apply, tensors, (1, 2))
    totals = [torch.ones_like(t, dtype=torch.float32) for t in tensors[1:]]
    ours, *_ = summed(lambda *t: SquaredReluMLP.apply(*t, *totals), tensors, (1, 2))
    assert torch.equal(ours, dx)
    for total, expected in zip(totals, (d_up, d_down), strict=True):
        assert relative(total - 1, expected.float()) < TOLERANCE


def test_a_product_with_the_stream_adds_to_its_sum():
    tensors = randoms((2, 70, 64), (48, 64), (2, 70, 48))
    dy, dw, d_stream = summed(cudnn_products.LinearPlus.apply, tensors, (1,))
    total = torch.ones(48, 64, device=DEVICE)
    ours = summed(lambda *t: cudnn_products.LinearPlus.apply(*t, total), tensors, (1,))
    assert torch.equal(ours[0], dy) and torch.equal(ours[2], d_stream) and relative(total - 1, dw.float()) < TOLERANCE


@triton
def test_the_product_of_queries_keys_and_values_adds_to_one_sum():
    pytest.importorskip("triton.tools.tensor_descriptor")
    from nanochat_hf.kernels.projections import QueriesKeysValues

    sizes, D = (3, 1, 1), 64
    x, weights, rope = projected(70, 64, sizes, D, torch.Generator().manual_seed(0))
    tensors = [x, *(weight.to(KIND) for weight in weights)]
    dx, *expected = summed(lambda *t: QueriesKeysValues.apply(*t, rope, *sizes[:2]), tensors, (1, 2, 3))
    total = torch.ones(5 * D, 64, device=DEVICE)
    ours, *_ = summed(lambda *t: QueriesKeysValues.apply(*t, rope, *sizes[:2], total), tensors, (1, 2, 3))
    assert torch.equal(ours, dx) and relative(total - 1, torch.cat(expected).float()) < TOLERANCE


@triton
@pytest.mark.parametrize("ids", ["few", "one", "long"])
def test_gated_rows_add_to_the_tables_sum(ids):
    """Rows without a token stay as they were; rows of several programs are added to once."""
    from nanochat_hf.kernels import value_embedding

    (B, T, K, D), rows = (2, 170, 3, 32), 500
    index = torch.randint(rows, (B, T), generator=torch.Generator().manual_seed(0))
    if ids == "one":
        index[:] = 7
    elif ids == "long":
        index[1, 10:], index[0, 40:60] = 3, 3
    index = index.to(DEVICE)
    table, gate = randoms((rows, K * D), (B, T, K))
    order = value_embedding.order_of_ids(index, rows)
    d_gate, d_table = summed(lambda *t: value_embedding.GatedRows.apply(*t, index, *order), (gate, table.float()), (1,))
    total = torch.ones(rows, K * D, device=DEVICE)
    ours, _ = summed(lambda *t: value_embedding.GatedRows.apply(*t, index, *order, total), (gate, table.float()), (1,))
    assert torch.equal(ours, d_gate) and relative(total - 1, d_table) < 1e-5
    untouched = torch.ones(rows, dtype=torch.bool, device=DEVICE).index_fill_(0, index.flatten(), False)
    assert untouched.any() and (total[untouched] == 1).all()


@pytest.mark.parametrize("shape", [(5120, 1280), (1280, 5120)] if HALF else [(80, 48)])
def test_the_operator_adds_the_product(shape):
    g, x = randoms((256, shape[0]), (256, shape[1]))
    expected = g.float().mT @ x.float()
    total = torch.ones_like(expected)
    sums.add_weight_gradient(total, g, x)
    assert relative(total - 1, expected) < 1e-5


def two_micro_batches(model, call, wanted, dtype=None):
    """Gradients after two passes, the second of other ids, and what was kept."""
    inputs = [batch(DEVICE), batch(DEVICE)]
    inputs[1]["input_ids"] = inputs[1]["input_ids"].flip(1)
    with kernels.kept_sums(model, wanted, dtype) as kept, torch.autocast(DEVICE, torch.bfloat16, enabled=HALF or dtype is not None):
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
    """In half precision a compiled graph rounds elsewhere with the sums than without: most in the scalars, small differences of large sums."""
    model = tiny(DEVICE)
    half = HALF or dtype is not None
    kernels.install(model)
    call = compiled(model) if compile else model
    kept, plain = two_micro_batches(model, call, False, dtype)
    assert not kept
    model.zero_grad()
    for _ in range(2):  # the second time in new tensors
        kept, found = two_micro_batches(model, call, True, dtype)
        assert kept.groups and len(kept.halves) == (0 if dtype is None else sum(map(len, kept.groups)))
        for name, expected in plain.items():
            assert relative(found[name], expected) < (TOLERANCE if not half else 5e-2 if expected.dim() == 1 else 2e-2), name
        assert all(p.grad is None for name, p in model.named_parameters() if "mlp" in name or "value_embeds" in name)
        assert not any(name in vars(module) for module in model.modules() for name in ("weight_sum", "weight_half"))
        model.zero_grad()


@triton
def test_without_its_gradient_a_weight_is_summed_by_autograd():
    """A loop that sets gradients to None, or takes them by torch.autograd.grad, does not lose them."""
    model, inputs = tiny(DEVICE), batch(DEVICE)
    kernels.install(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    (expected,) = torch.autograd.grad(model(**inputs).loss, weight)
    with kernels.kept_sums(model):
        model.zero_grad()
        model(**inputs).loss.backward()
        assert relative(weight.grad, expected) < TOLERANCE


@triton
def test_half_and_replaced_weights_have_no_sums_and_models_with_frozen_ones_none():
    model = tiny(DEVICE)
    kernels.install(model)
    first, second, *_ = model.model.layers
    first.mlp.down_proj.to(torch.bfloat16)
    second.mlp.up_proj = torch.nn.Sequential(second.mlp.up_proj)
    with kernels.kept_sums(model):
        with_sums = [module for module in model.modules() if "weight_sum" in vars(module)]
        assert second.mlp.down_proj in with_sums
        assert not {first.mlp.down_proj, second.mlp.up_proj, second.mlp.up_proj[0]} & set(with_sums)
    second.mlp.down_proj.weight.requires_grad_(False)
    with kernels.kept_sums(model) as kept:
        assert kept is None


@triton
def test_rounded_weights_are_those_of_the_last_refresh():
    model, inputs = tiny(DEVICE), batch(DEVICE)
    kernels.install(model)
    with kernels.kept_sums(model, dtype=torch.bfloat16) as kept, torch.autocast(DEVICE, torch.bfloat16):
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
    ("processes", "kind", "steps", "wanted"), [(1, "cuda", 2, True), (2, "cuda", 2, False), (1, "cpu", 2, False), (1, "cuda", 1, False)]
)
def test_one_process_with_several_micro_batches_keeps_sums(processes, kind, steps, wanted):
    """Several processes reduce what autograd hands them; of one micro-batch there is no sum."""
    model = tiny(DEVICE)
    kernels.install(model)
    trainer = Trainer.__new__(Trainer)
    trainer.accelerator = SimpleNamespace(num_processes=processes, device=torch.device(kind), mixed_precision="bf16")
    trainer.raw_model, trainer.accumulation = model, steps
    with trainer.kept_sums() as kept:
        assert bool(kept) == wanted and (not wanted or kept.halves[0].dtype == torch.bfloat16)


class Batches:
    """Micro-batches without end."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(3)
        while True:
            yield {name: torch.randint(IDS, (2, 32), generator=generator) for name in ("input_ids", "shift_labels")}


def trained(monkeypatch, wanted):
    """Four steps of two micro-batches → (StepInfo of each, weights)."""
    accelerator = Accelerator(
        cpu=DEVICE == "cpu", gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
    )
    model, seen = tiny(DEVICE), []
    kernels.install(model)
    monkeypatch.setattr(Trainer, "kept_sums", lambda trainer: kernels.kept_sums(trainer.raw_model, wanted))

    def watch(trainer, info):
        assert bool(trainer.kept) == wanted
        seen.append(info)

    optimizer = MuonAdamW(build_param_groups(model), orthogonalize_dtype=torch.float32, compile=False)
    Trainer(
        accelerator, model, optimizer, Batches(), num_steps=4, schedule=lambda optimizer, step: 1.0, norms_every=1, callbacks=[watch]
    ).fit()  # fmt: skip
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    return seen, [parameter.detach() for parameter in model.parameters()]


@triton
def test_training_by_sums_learns_the_same(monkeypatch):
    """Zeroed after each step, with the weights of each step, and as the optimizer and the norms see them."""
    (plain, weights), (ours, found) = (trained(monkeypatch, wanted) for wanted in (False, True))
    for a, b in zip(ours, plain, strict=True):
        assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-2 if HALF else 1e-4)
        assert all(
            a.grad_norms[name].item() == pytest.approx(norm.item(), rel=5e-2 if HALF else 1e-3) for name, norm in b.grad_norms.items()
        )
    assert all(relative(a, b) < (5e-2 if HALF else 1e-3) for a, b in zip(found, weights, strict=True))


def test_a_model_without_kernels_keeps_none():
    model = tiny(DEVICE)
    for each in (model, torch.nn.Linear(2, 2)):
        with kernels.kept_sums(each) as kept:
            assert kept is None
