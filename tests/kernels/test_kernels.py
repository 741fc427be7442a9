"""Fused kernels against the plain formulas of the model: on a GPU, or by Triton's interpreter where triton is installed without one."""

from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from nanochat_hf import NanochatConfig, NanochatForCausalLM, kernels
from nanochat_hf.kernels.mlp import SquaredReluMLP
from nanochat_hf.model.modeling_nanochat_hf import nll_and_slope, norm, rotate
from nanochat_hf.optim import MuonAdamW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
IDS = 300


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def tiny(device="cpu", **settings):
    torch.manual_seed(0)
    sizes = dict(vocab_size=IDS, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
    model = NanochatForCausalLM(NanochatConfig(**sizes | settings)).to(device).train()
    for parameter in model.parameters():  # at their zero initialisation most paths carry no gradient
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def batch(device="cpu"):
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(IDS, (2, 32), generator=generator) for _ in range(2))
    labels[0, :5] = -100
    positions = torch.stack((torch.arange(32), torch.arange(32) % 16))
    return {key: value.to(device) for key, value in dict(input_ids=ids, shift_labels=labels, position_ids=positions).items()}


def compiled(model):
    """As one graph; the interpreter's kernels run between operators that are not compiled further."""
    return torch.compile(model, fullgraph=True, dynamic=False, backend="inductor" if DEVICE == "cuda" else "aot_eager")


def gradients(model, inputs, call=None):
    model.zero_grad()
    loss = (model if call is None else call)(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_the_mlp_kernel_is_the_mlp(dtype, tolerance):
    torch.manual_seed(0)
    x, up, down = torch.randn(2, 8, 32), torch.randn(128, 32) / 6, torch.randn(32, 128) / 11
    results = []
    for function in (lambda x, u, d: F.linear(F.relu(F.linear(x, u)).square(), d), SquaredReluMLP.apply):
        tensors = [t.clone().requires_grad_() for t in (x, up, down)]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = function(*tensors)
        y.float().square().sum().backward()
        results.append([y, *(t.grad for t in tensors)])
        assert all(t.grad.dtype == t.dtype for t in tensors)
    assert max(relative(b, a) for a, b in zip(*results, strict=True)) < tolerance


def test_the_mlp_kernel_keeps_one_wide_activation():
    kept = []
    x, up, down = torch.randn(16, 32, requires_grad=True), torch.randn(128, 32), torch.randn(32, 128)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        SquaredReluMLP.apply(x, up, down)
    assert kept.count((16, 128)) == 1


def test_nll_and_slope_is_cross_entropy_of_capped_logits():
    torch.manual_seed(0)
    logits, target, weight = (torch.randn(9, 50) * 20).requires_grad_(), torch.randint(50, (9,)), torch.rand(9)
    target[3] = -100
    plain = F.cross_entropy(15 * torch.tanh(logits / 15), target, ignore_index=-100, reduction="none") * weight
    plain.sum().backward()
    nll, slope = nll_and_slope(logits.detach(), target, weight, 15.0)
    torch.testing.assert_close(nll, plain.detach())
    torch.testing.assert_close(slope, logits.grad)


class Halved(torch.nn.Linear):
    """Stands for what replaces a linear layer later: float8, an adapter."""

    def forward(self, x):
        return super().forward(x) / 2


@pytest.mark.parametrize(("owner", "name"), [("mlp", "up_proj"), ("self_attn", "k_proj")])
def test_layers_replaced_after_the_kernels_came_are_called(owner, name):
    model, inputs = tiny(), batch()
    for layer in model.model.layers:
        old = getattr(getattr(layer, owner), name)
        new = Halved(old.in_features, old.out_features, bias=False)
        new.load_state_dict(old.state_dict())
        setattr(getattr(layer, owner), name, new)
    loss, plain = gradients(model, inputs)
    for layer in model.model.layers:
        getattr(layer, owner).fused = {"mlp": kernels.squared_relu, "self_attn": kernels.queries_keys_values}[owner]
    fused_loss, fused = gradients(model, inputs)
    assert fused_loss == loss and all(torch.equal(fused[key], plain[key]) for key in plain)


def test_a_cap_that_the_sum_of_exponentials_cannot_hold_keeps_the_formula():
    assert "softcapped cross-entropy" not in kernels.install(tiny(final_logit_softcapping=100.0))
    assert "softcapped cross-entropy" in kernels.install(tiny(final_logit_softcapping=40.0))


def test_without_a_gpu_nothing_is_available_and_the_reason_is_said():
    assert kernels.available(torch.device("cpu")) == (False, "no Triton on cpu")


@triton
@pytest.mark.parametrize("shared", [True, False])
def test_rope_norm(shared):
    from nanochat_hf.kernels.rope import RopeNorm

    torch.manual_seed(0)
    B, T, H, K, D = 2, 37, 3, 1, 128
    x = torch.randn(B, T, (H + K) * D, device=DEVICE)
    angle = torch.randn(1 if shared else B, T, 1, D // 2, device=DEVICE)
    rope = torch.stack((angle.cos(), angle.sin())).bfloat16()
    slopes = torch.randn(B, H, T, D, device=DEVICE).transpose(1, 2), torch.randn(B, T, K, D, device=DEVICE)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.autograd.backward(RopeNorm.apply(ours, rope, H, K), slopes)
    cos, sin = rope.float()
    torch.autograd.backward(norm(rotate(plain.view(B, T, H + K, D), cos, sin)).split((H, K), dim=2), slopes)
    assert relative(ours.grad, plain.grad) < 1e-6


@triton
@pytest.mark.parametrize("vocab", [300, 5000, 16384, 40000, 65536])  # rows that a program holds whole, and longer ones
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])  # bfloat16 is rounded twice
def test_cross_entropy_kernel(dtype, tolerance, vocab):
    from nanochat_hf.kernels.cross_entropy import softcapped_nll_

    torch.manual_seed(0)
    logits = (torch.randn(9, vocab, device=DEVICE) * 20).to(dtype)
    target, weight = torch.randint(vocab, (9,), device=DEVICE), torch.rand(9, device=DEVICE)
    target[3] = -100
    nll, slope = nll_and_slope(logits.float(), target, weight, 15.0)
    assert relative(softcapped_nll_(logits, target, weight, 15.0), nll) < tolerance
    assert relative(logits, slope) < tolerance  # in place


@triton
def test_the_whole_model_with_kernels_is_the_model_in_float32():
    model, inputs = tiny(DEVICE), batch(DEVICE)
    loss, plain = gradients(model, inputs)
    assert kernels.install(model) == [
        "residual stream and its norms", "rope and norm of queries and keys", "softcapped cross-entropy", "squared ReLU", "value embeddings' gradients",
    ]  # fmt: skip
    fused_loss, fused = gradients(model, inputs)
    assert abs(fused_loss - loss) < 2e-5
    assert max(relative(fused[name], plain[name]) for name in plain) < 2e-5


@triton
@pytest.mark.parametrize("compile", [False, True])
def test_with_kernels_bfloat16_strays_no_further_from_float32(compile):
    model, inputs = tiny(DEVICE), batch(DEVICE)
    _, exact = gradients(model, inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        _, plain = gradients(model, inputs)
        kernels.install(model)
        _, fused = gradients(model, inputs, compiled(model) if compile else None)
    matrices = [name for name in exact if exact[name].ndim == 2]
    for name in matrices:
        assert relative(fused[name], exact[name]) < 1.5 * relative(plain[name], exact[name]) + 2e-3, name


@triton
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (80, 80)])  # 96·64 and 80·80 elements do not fill the last block
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])  # the directions are rounded before or after their division
def test_muons_kernels_are_its_formulas(shape, dtype, tolerance):
    """Five steps with a schedule, cautious decay and a gradient that is not finite; the way without kernels is held to float64 elsewhere."""
    runs = []
    for fused in (False, True):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for _ in range(3)]
        group = {"kind": "muon", "params": params, "lr": 0.02, "momentum": 0.9, "betas": (0.0, 0.95), "weight_decay": 0.03}
        optimizer = MuonAdamW([group], orthogonalize_dtype=dtype, fused=fused, compile=False)
        for step in range(5):
            optimizer.param_groups[0] |= {"lr": 0.02 * (1 - step / 10), "momentum": 0.85 + step / 100}
            for param in params:
                param.grad = torch.randn(shape, generator=generator).to(DEVICE)
            if step == 3:
                params[1].grad[5, 7] = float("inf")
            optimizer.step()
        (unit,) = optimizer._units
        assert (unit.tables is not None) == fused
        assert optimizer.skipped_steps == 1
        start = [torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)]
        runs.append([*(p.detach() for p in params), unit.buffer, unit.second, params[0].detach() - start[0]])
    for a, b in zip(*runs, strict=True):
        assert relative(b, a) < tolerance, relative(b, a)


@triton
def test_muons_kernels_write_elsewhere_too():
    """As they do for other processes: the parameters stay until all shares are gathered."""
    from nanochat_hf.kernels import muon

    params = [torch.randn(64, 80, device=DEVICE) for _ in range(2)]
    before, out = [p.clone() for p in params], torch.zeros(2, 64, 80, device=DEVICE)
    update, factor = torch.randn(2, 64, 80, device=DEVICE, dtype=torch.bfloat16), torch.rand(2, 1, 80, device=DEVICE)
    tables, ok = muon.Tables(), torch.ones((), dtype=torch.bool, device=DEVICE)
    muon.apply(tables.get("params", params), tables.get("out", list(out)), update, factor, 0.5, 0.0, ok)
    for i, param in enumerate(params):
        assert torch.equal(param, before[i])
        torch.testing.assert_close(out[i], param - 0.5 * update[i].float() * factor[i])
    muon.apply(tables.get("params", params), tables.get("out", list(out)), update, factor, 0.5, 0.0, ~ok)
    assert torch.equal(out, torch.stack(before))


@triton
def test_muon_does_without_kernels_where_they_do_not_fit():
    params = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in [(6, 5)] * 2]  # 30 elements: the second of a stack is not aligned
    optimizer = MuonAdamW([{"kind": "muon", "params": params, "lr": 0.02}], fused=True, compile=False)
    for param in params:
        param.grad = torch.randn_like(param)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert optimizer._units[0].tables is None
    assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True))


@triton
@pytest.mark.parametrize("dtype", [torch.bfloat16] if DEVICE == "cuda" else [torch.float32])
@pytest.mark.parametrize("shape", [(300, 96, 384), (128, 64, 256), (7, 40, 160)])
def test_products_with_the_squared_relu_inside(dtype, shape):
    pytest.importorskip("triton.tools.tensor_descriptor")
    if DEVICE == "cpu" and version("triton") < "3.7":
        pytest.skip("the interpreter of Triton before 3.7 cannot loop to a number that is computed, under numpy 2.4")
    from nanochat_hf.kernels import matmul

    torch.manual_seed(0)
    N, C, W = shape
    x, dy = (torch.randn(N, C, device=DEVICE, dtype=dtype) for _ in range(2))
    up, down = torch.randn(W, C, device=DEVICE, dtype=dtype), torch.randn(C, W, device=DEVICE, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    squared = matmul.squared_relu_up(x, up)
    assert relative(squared, torch.relu(x.float() @ up.float().mT).square()) < tolerance
    slope = matmul.squared_relu_down_backward(dy, down, squared)
    assert relative(slope, (dy.float() @ down.float()) * 2 * squared.float().sqrt()) < tolerance
