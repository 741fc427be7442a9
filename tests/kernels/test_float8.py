"""The parts of a layer with float8 products against float64 and float32.

They run on a GPU with float8, else on the CPU, where torch._scaled_mm multiplies float8 too.

Tolerances: rounding to e4m3 (3 bits of mantissa) has a relative error of at most 2^-4, about 2.6 % in the mean;
rounding to e5m2 (2 bits) at most 2^-3, about 5.2 % in the mean. The squares of the factors' errors add up. So a
product of two e4m3 is 3.7 % off, and one with an e5m2 gradient 5.8 %. The MLP squares a result, and its gradient is
rounded to e5m2 twice.
"""

from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F

from nanochat_hf.kernels.float8 import capable
from nanochat_hf.kernels.float8 import layers as float8_layers
from nanochat_hf.kernels.float8 import products as float8
from tests.support.kernels import FLOAT8_DEVICES as DEVICES
from tests.support.kernels import relative, triton

CAPABLE = torch.cuda.is_available() and capable(torch.device("cuda"))[0]


def plain_projections(x, q, k, v):
    return F.linear(x, torch.cat((q, k))), F.linear(x, v)


def plain_mlp(x, up, down):
    return F.linear(F.relu(F.linear(x, up)).square(), down)


def tensors(part, N=256, C=128):
    torch.manual_seed(0)
    x = F.rms_norm(torch.randn(2, N // 2, C), (C,))
    if part == "projections":
        return x, *(torch.randn(width, C) / 8 for width in (C, 64, 64))
    return (
        (x * 30, torch.randn(64, C) / 8)
        if part == "linear"
        else (x, torch.randn(4 * C, C) / 8, torch.randn(C, 4 * C) / 16)
    )


PARTS = {
    "projections": (float8_layers.Projections.apply, plain_projections, (0.042, 0.065)),
    "linear": (float8_layers.Linear.apply, F.linear, (0.042, 0.065)),
    "mlp": (float8_layers.SquaredReluMLP.apply, plain_mlp, (0.07, 0.105)),
}


def outputs_and_gradients(function, inputs, slopes=1.0):
    inputs = [t.clone().requires_grad_() for t in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(2)
    torch.autograd.backward(outputs, [(torch.randn(y.shape, generator=generator) * slopes).to(y) for y in outputs])
    return list(outputs), [t.grad for t in inputs]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slopes", [1.0, 1e-9])  # of a mean over 1e6 tokens
@pytest.mark.parametrize("part", PARTS)
def test_each_part_is_its_formula_up_to_float8(part, slopes, device):
    ours, formula, tolerances = PARTS[part]
    inputs = tensors(part)
    exact = outputs_and_gradients(formula, [t.double() for t in inputs], slopes)
    got = outputs_and_gradients(ours, [t.to(device) for t in inputs], slopes)
    for found, expected, tolerance in zip(got, exact, tolerances, strict=True):
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == torch.float32 and relative(a.cpu(), b) < tolerance, relative(a.cpu(), b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", PARTS)
def test_tensors_of_zeros_give_zeros(part, device):
    inputs = tensors(part)
    for index in range(len(inputs)):
        some = [(t * (i != index)).to(device) for i, t in enumerate(inputs)]
        outputs, grads = outputs_and_gradients(PARTS[part][0], some)
        exact = outputs_and_gradients(PARTS[part][1], some)
        for a, b in zip([*outputs, *grads], [*exact[0], *exact[1]], strict=True):
            assert a.isfinite().all() and (b.count_nonzero() or not a.count_nonzero())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", PARTS)
def test_what_is_not_finite_is_not_hidden(part, device):
    """The optimizer leaves out matrices whose gradient is not finite, so a broken one may not come back as numbers."""
    ours, inputs = PARTS[part][0], [t.to(device) for t in tensors(part)]
    _, grads = outputs_and_gradients(ours, inputs, slopes=float("nan"))
    assert not any(grad.isfinite().all() for grad in grads)
    outputs, _ = outputs_and_gradients(ours, [inputs[0], *(torch.full_like(t, float("inf")) for t in inputs[1:])])
    assert not any(y.isfinite().all() for y in outputs)


def test_backward_keeps_one_byte_an_element():
    kept = []
    x, up, down = (t.requires_grad_() for t in tensors("mlp"))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        float8_layers.SquaredReluMLP.apply(x, up, down)
    large = [t for t in kept if t.numel() > 1]
    assert (
        all(t.element_size() == 1 for t in large)
        and sum(t.numel() for t in large) == x.numel() * 5 + up.numel() + down.numel()
    )


def test_rows_longer_than_any_row_before_still_fit_their_bound():
    """All of a row in one channel, and a weight that looks along it: what the bounds of Cauchy and Schwarz are for."""
    C = 64
    x = torch.zeros(16, C)
    x[:, 3] = C**0.5
    up, down = torch.zeros(4 * C, C), torch.eye(C, 4 * C)
    up[:, 3] = 2.0
    y = float8_layers.SquaredReluMLP.apply(x, up, down)
    torch.testing.assert_close(y, plain_mlp(x, up, down), rtol=0.01, atol=0)


@triton
@pytest.mark.parametrize("shape", [(48, 16), (128, 64), (272, 80)])
def test_the_casting_kernel_writes_both_layouts(shape):
    """The numbers are exact in float8: Triton's interpreter rounds wrongly where a carry reaches the exponent."""
    from nanochat_hf.kernels.float8 import casts as float8_casts

    device = "cuda" if CAPABLE else "cpu"
    generator = torch.Generator().manual_seed(0)

    def chosen(values, *shape):
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)].to(device)

    n, c = shape
    unit, other = torch.tensor(0.25, device=device), torch.tensor(4.0, device=device)
    x = chosen([-3.0, -0.5, 0.0, 1.0, 1.5, 2.0], n, c).bfloat16()
    kept = chosen([0.0, 1.0, 4.0, 0.25], c, n).to(float8.E4M3)
    expected = {
        (float8_casts.CAST, float8.E5M2): x.float() * 4,
        (float8_casts.SQUARE, float8.E4M3): x.float().relu().square() * 4,
        (float8_casts.SLOPE, float8.E5M2): x.float() * 2 * (kept.t().float() * 4).sqrt() * 4,
    }
    for (mode, dtype), values in expected.items():
        wide = torch.zeros(n, 2 * c, device=device).to(dtype), torch.zeros(2 * c, n, device=device).to(dtype)
        out, turned = wide[0][:, c:], wide[1][c:]
        float8_casts.launch(mode, x, out, turned, unit, kept, other)
        assert torch.equal(out.float(), values) and torch.equal(turned.float(), values.t())
        assert not wide[0][:, :c].float().any() and not wide[1][:c].float().any()
        again = torch.empty(c, n, device=device, dtype=dtype)
        float8_casts.launch(float8_casts.TRANSPOSE, out, None, again)
        assert torch.equal(again.float(), values.t())
    if device == "cuda":
        x = torch.randn(n, c, device=device)
        for dtype in (float8.E4M3, float8.E5M2):
            out, turned = float8.cast([x], float8.unit_of(x.abs().amax(), dtype), dtype, 1)
            assert (
                torch.equal(turned.float(), out.t().float())
                and relative(out, float8.scaled(x, float8.unit_of(x.abs().amax(), dtype), dtype)) < 1e-2
            )


@pytest.mark.skipif(not CAPABLE, reason="no CUDA device with float8 products")
def test_casts_inside_the_products_and_after_them_agree_in_the_mlp(monkeypatch):
    results = []
    for inside in (True, False):
        monkeypatch.setattr(float8, "INSIDE", inside)
        outputs, grads = outputs_and_gradients(PARTS["mlp"][0], [t.cuda() for t in tensors("mlp")])
        results.append([*outputs, *grads])
    assert all(relative(a, b) < 0.05 for a, b in zip(*results, strict=True))


@triton
@pytest.mark.parametrize("shape", [(48, 16, 64), (272, 144, 400)])
def test_the_products_with_casts_inside_are_those_with_casts_after(shape):
    """Of numbers that float8 holds exactly, for the same reason."""
    pytest.importorskip("triton.tools.tensor_descriptor")
    if not CAPABLE and version("triton") < "3.7":
        pytest.skip("the interpreter of Triton before 3.7 cannot loop to a number that is computed, under numpy 2.4")
    from nanochat_hf.kernels.float8 import matmul as float8_matmul

    device = "cuda" if CAPABLE else "cpu"
    N, C, W = shape
    generator = torch.Generator().manual_seed(0)

    def sparse(rows, values):
        """One number in each row, so that no sum has to be rounded."""
        at = torch.randint(C, (rows, 1), generator=generator)
        return (
            torch.zeros(rows, C)
            .scatter(1, at, torch.tensor(values)[torch.randint(len(values), (rows, 1), generator=generator)])
            .to(device)
        )

    x, w, units = (
        sparse(N, [1.0, -2.0, 0.5]),
        sparse(W, [1.0, 2.0]),
        [torch.tensor(value, device=device) for value in (2.0, 0.5)],
    )
    unit, kept_unit = torch.tensor(0.25, device=device), torch.tensor(4.0, device=device)
    w = w.index_add(
        1, torch.arange(0, C, 3, device=device), torch.ones(W, len(range(0, C, 3)), device=device)
    )  # enough that is not 0
    a, a_t = float8_matmul.launch(x.to(float8.E4M3), w.to(float8.E4M3), units, unit, float8.E4M3)
    expected = (x @ w.t()).relu().square() * 4
    assert expected.count_nonzero() > expected.numel() / 16
    assert torch.equal(a.float(), expected.to(float8.E4M3).float()) and torch.equal(a_t.float(), a.float().t())
    kept = torch.tensor([0.0, 1.0, 4.0])[torch.randint(3, (W, N), generator=generator)].to(device)
    s, s_t = float8_matmul.launch(
        x.to(float8.E5M2), w.to(float8.E4M3), units, unit, float8.E5M2, kept.to(float8.E4M3), kept_unit
    )
    expected = (x @ w.t()) * 2 * (kept.t() * 4).sqrt() * 4
    assert torch.equal(s.float(), expected.to(float8.E5M2).float()) and torch.equal(s_t.float(), s.float().t())
