"""Float8 products for training. A tensor is divided by its unit before the cast; a product is multiplied by both units.

Activations and weights are e4m3 (3 bits of mantissa). Gradients are e5m2 (2 bits, and a wider range). The tensor cores
need the inner axis of both operands contiguous. So the products of backward read transposes, which the cast writes as
well. Letters: N tokens, C hidden_size, W = 4C intermediate_size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    from . import matmul  # needs Triton's tensor descriptors
except ImportError:
    matmul = None

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TINY = 2.0**-100  # the least maximum, so that a tensor of zeros has a unit above 0
INSIDE = True  # cast the MLP's results inside its products where the GPU can; False, to compare: cuBLAS, then a cast


def inside(x: Tensor) -> bool:
    """Whether one kernel multiplies and casts in the MLP, for tensors like `x`."""
    return INSIDE and matmul is not None and matmul.suits(x)


def unit_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit, 0-d float32, that makes `largest` (a maximum or a bound) the largest number of the float8 dtype."""
    return largest.float().clamp(min=TINY) / torch.finfo(dtype).max


def largest(x: Tensor) -> Tensor:
    """Largest absolute value of x (N, C), along rows first, which the compiler can fuse with the norm."""
    return x.abs().amax(-1).amax()


def longest(x: Tensor) -> Tensor:
    """Largest norm of the rows of x (N, C), 0-d float32."""
    return x.float().square().sum(-1).amax().sqrt()


def scaled(x: Tensor, unit: Tensor, dtype: torch.dtype) -> Tensor:
    """x / unit as float8."""
    highest = torch.finfo(dtype).max
    return (x.float() * (1.0 / unit)).clamp(-highest, highest).to(dtype)


def product(a: Tensor, b: Tensor, units: tuple[Tensor, Tensor], dtype: torch.dtype, fast: bool = True) -> Tensor:
    """a (n, k) · bᵀ of b (m, k), both float8 with contiguous rows → (n, m) of `dtype`, times both `units`.

    `fast` sums in the tensor cores alone, which keep 14 bits.
    """
    return _product(a, b, *units, dtype, fast)


# An operator of our own around torch's, so that the compiler neither changes layouts nor tunes its own templates.
@torch.library.custom_op("nanochat_hf::float8_product", mutates_args=())
def _product(
    a: torch.Tensor, b: torch.Tensor, a_unit: torch.Tensor, b_unit: torch.Tensor, dtype: torch.dtype, fast: bool
) -> torch.Tensor:
    return torch._scaled_mm(a, b.t(), scale_a=a_unit, scale_b=b_unit, out_dtype=dtype, use_fast_accum=fast)


@_product.register_fake
def _(a, b, a_unit, b_unit, dtype, fast):
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


@torch.library.custom_op("nanochat_hf::float8_cast", mutates_args=())
def cast(
    parts: Sequence[torch.Tensor], unit: torch.Tensor, dtype: torch.dtype, axis: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices, concatenated along `axis` → (n, c) float8 in units of `unit`, and its transpose (c, n)."""
    if not parts[0].is_cuda:
        joined = scaled(torch.cat(list(parts), axis), unit, dtype)
        return joined, joined.t().contiguous()
    from . import casts

    n, c = _joined(parts, axis)
    out, turned = parts[0].new_empty(n, c, dtype=dtype), parts[0].new_empty(c, n, dtype=dtype)
    start = 0
    for part in parts:
        size = part.shape[axis]
        casts.launch(casts.CAST, part, out.narrow(axis, start, size), turned.narrow(1 - axis, start, size), unit)
        start += size
    return out, turned


def _joined(parts, axis):
    n, c = parts[0].shape
    total = sum(part.shape[axis] for part in parts)
    return (total, c) if axis == 0 else (n, total)


@cast.register_fake
def _(parts, unit, dtype, axis):
    n, c = _joined(parts, axis)
    return parts[0].new_empty(n, c, dtype=dtype), parts[0].new_empty(c, n, dtype=dtype)


@torch.library.custom_op("nanochat_hf::float8_transposed", mutates_args=())
def transposed(x: torch.Tensor) -> torch.Tensor:
    """A float8 matrix (n, c) → (c, n). An operator, so that the compiler keeps the result for backward."""
    out = x.new_empty(x.shape[::-1])
    if x.is_cuda:
        from . import casts

        casts.launch(casts.TRANSPOSE, x, None, out)
    else:
        out.copy_(x.t())
    return out


@transposed.register_fake
def _(x):
    return x.new_empty(x.shape[::-1])


@torch.library.custom_op("nanochat_hf::float8_squared_relu", mutates_args=())
def squared_relu(
    x: torch.Tensor, up: torch.Tensor, x_unit: torch.Tensor, up_unit: torch.Tensor, unit: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """a = relu(x·upᵀ)² of x (N, C) and up (W, C), float8, as e4m3 in units of `unit` → a (N, W), aᵀ (W, N)."""
    if matmul is not None and inside(x):
        return matmul.launch(x, up, (x_unit, up_unit), unit, E4M3)
    if not x.is_cuda:
        a = scaled(torch.relu(product(x, up, (x_unit, up_unit), torch.float32)).square(), unit, E4M3)
        return a, a.t().contiguous()
    from . import casts

    a, a_t = x.new_empty(x.shape[0], up.shape[0], dtype=E4M3), x.new_empty(up.shape[0], x.shape[0], dtype=E4M3)
    casts.launch(casts.SQUARE, product(x, up, (x_unit, up_unit), torch.bfloat16), a, a_t, unit)
    return a, a_t


@squared_relu.register_fake
def _(x, up, x_unit, up_unit, unit):
    return x.new_empty(x.shape[0], up.shape[0], dtype=E4M3), x.new_empty(up.shape[0], x.shape[0], dtype=E4M3)


@torch.library.custom_op("nanochat_hf::float8_slope", mutates_args=())
def slope(
    g: torch.Tensor,
    down_t: torch.Tensor,
    g_unit: torch.Tensor,
    down_unit: torch.Tensor,
    a_t: torch.Tensor,
    a_unit: torch.Tensor,
    unit: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(g·down)·2·√a, the gradient before the squared ReLU, as e5m2 in units of `unit` → (N, W), (W, N).

    g (N, C), downᵀ (W, C) and aᵀ (W, N) are float8.
    """
    if matmul is not None and inside(g):
        return matmul.launch(g, down_t, (g_unit, down_unit), unit, E5M2, a_t, a_unit)
    if not g.is_cuda:
        d = product(g, down_t, (g_unit, down_unit), torch.float32)
        s = scaled(d * (2 * (a_t.t().float() * a_unit).sqrt()), unit, E5M2)
        return s, s.t().contiguous()
    from . import casts

    s, s_t = g.new_empty(a_t.shape[::-1], dtype=E5M2), g.new_empty(a_t.shape, dtype=E5M2)
    casts.launch(casts.SLOPE, product(g, down_t, (g_unit, down_unit), torch.bfloat16), s, s_t, unit, a_t, a_unit)
    return s, s_t


@slope.register_fake
def _(g, down_t, g_unit, down_unit, a_t, a_unit, unit):
    return g.new_empty(a_t.shape[::-1], dtype=E5M2), g.new_empty(a_t.shape, dtype=E5M2)
