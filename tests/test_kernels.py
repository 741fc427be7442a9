"""Fused kernels against the plain formulas of the model. What needs Triton runs on a GPU alone, and says so where there is none."""

import pytest
import torch
import torch.nn.functional as F

from nanochat_hf import NanochatConfig, NanochatForCausalLM, kernels
from nanochat_hf.kernels.mlp import squared_relu_mlp
from nanochat_hf.model.modeling_nanochat_hf import nll_and_slope, norm, rotate

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton kernels run on a GPU, and there is none here")
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


def gradients(model, inputs, call=None):
    model.zero_grad()
    loss = (call or model)(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_the_mlp_kernel_is_the_mlp(dtype, tolerance):
    torch.manual_seed(0)
    x, up, down = torch.randn(2, 8, 32), torch.randn(128, 32) / 6, torch.randn(32, 128) / 11
    results = []
    for function in (lambda x, u, d: F.linear(F.relu(F.linear(x, u)).square(), d), squared_relu_mlp):
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
        squared_relu_mlp(x, up, down)
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


def test_without_a_gpu_nothing_is_available_and_the_reason_is_said():
    assert kernels.available(torch.device("cpu")) == (False, "no Triton on cpu")


@gpu
@pytest.mark.parametrize("shared", [True, False])
def test_rope_norm_on_a_gpu(shared):
    from nanochat_hf.kernels.rope import RopeNorm

    torch.manual_seed(0)
    B, T, H, K, D = 2, 37, 3, 1, 128
    x = torch.randn(B, T, (H + K) * D, device="cuda")
    angle = torch.randn(1 if shared else B, T, 1, D // 2, device="cuda")
    rope = torch.stack((angle.cos(), angle.sin())).bfloat16()
    slopes = torch.randn(B, H, T, D, device="cuda").transpose(1, 2), torch.randn(B, T, K, D, device="cuda")
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.autograd.backward(RopeNorm.apply(ours, rope, H, K), slopes)
    cos, sin = rope.float()
    torch.autograd.backward(norm(rotate(plain.view(B, T, H + K, D), cos, sin)).split((H, K), dim=2), slopes)
    assert relative(ours.grad, plain.grad) < 1e-6


@gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-3)])
def test_cross_entropy_kernel_on_a_gpu(dtype, tolerance):
    from nanochat_hf.kernels.cross_entropy import softcapped_nll_

    torch.manual_seed(0)
    logits = (torch.randn(9, 5000, device="cuda") * 20).to(dtype)
    target, weight = torch.randint(5000, (9,), device="cuda"), torch.rand(9, device="cuda")
    target[3] = -100
    nll, slope = nll_and_slope(logits.float(), target, weight, 15.0)
    assert relative(softcapped_nll_(logits, target, weight, 15.0), nll) < tolerance
    assert relative(logits, slope) < tolerance  # in place


@gpu
@pytest.mark.parametrize(("dtype", "compile", "tolerance"), [(None, False, 2e-5), (torch.bfloat16, False, 3e-2), (torch.bfloat16, True, 3e-2)])
def test_the_whole_model_with_kernels_is_the_model(dtype, compile, tolerance):
    model, inputs = tiny("cuda"), batch("cuda")
    with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
        loss, plain = gradients(model, inputs)
        assert kernels.install(model) == ["rope and norm of queries and keys", "softcapped cross-entropy", "squared ReLU"]
        call = torch.compile(model, fullgraph=True, dynamic=False) if compile else None
        fused_loss, fused = gradients(model, inputs, call)
    assert abs(fused_loss - loss) < tolerance
    assert max(relative(fused[name], plain[name]) for name in plain if plain[name].ndim == 2) < tolerance
