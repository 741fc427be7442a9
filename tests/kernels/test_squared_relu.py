"""The MLP with the squared ReLU inside: what needs no Triton runs everywhere."""

from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F

from nanochat_hf.kernels.ops.squared_relu import SquaredReluMLP
from tests.support.kernels import DEVICE, relative, triton


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


@triton
@pytest.mark.parametrize("dtype", [torch.bfloat16] if DEVICE == "cuda" else [torch.float32])
@pytest.mark.parametrize("shape", [(300, 96, 384), (128, 64, 256), (7, 40, 160)])
def test_products_with_the_squared_relu_inside(dtype, shape):
    pytest.importorskip("triton.tools.tensor_descriptor")
    if DEVICE == "cpu" and version("triton") < "3.7":
        pytest.skip("the interpreter of Triton before 3.7 cannot loop to a number that is computed, under numpy 2.4")
    from nanochat_hf.kernels.lib import squared_relu as matmul

    torch.manual_seed(0)
    N, C, W = shape
    x, dy = (torch.randn(N, C, device=DEVICE, dtype=dtype) for _ in range(2))
    up, down = torch.randn(W, C, device=DEVICE, dtype=dtype), torch.randn(C, W, device=DEVICE, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    squared = matmul.squared_relu_up(x, up)
    assert relative(squared, torch.relu(x.float() @ up.float().mT).square()) < tolerance
    slope = matmul.squared_relu_down_backward(dy, down, squared)
    assert relative(slope, (dy.float() @ down.float()) * 2 * squared.float().sqrt()) < tolerance
