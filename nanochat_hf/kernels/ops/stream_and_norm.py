"""The norm of the stream after attention; its backward kernel also adds the stream's own gradient.

Letters: N tokens, C hidden_size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_hf.model.configuration_nanochat_hf import NanochatConfig

from ..lib.devices import FLOAT8, lacks_triton
from ..lib.rows import epsilon, programs, warps

OP = "stream_and_norm"


def fits(config: NanochatConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """None on a GPU with Triton, except for float8."""
    # torch.compile fuses the cast to float8 with its own kernel of the norm
    return lacks_triton(device) or ("float8 is cast in the kernel of the norm" if dtype == FLOAT8 else None)


def run(x: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    """x (B, T, C) and its norm."""
    return StreamAndNorm.apply(x, epsilon(eps))


@triton.jit
def _norm(x_ptr, normed_ptr, scale_ptr, C, eps, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at, keep = row * C + column, column < C
    x = tl.load(x_ptr + at, keep, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / C + eps)
    tl.store(normed_ptr + at, (x * scale).to(normed_ptr.dtype.element_ty), keep)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _norm_backward(d_x_ptr, d_normed_ptr, x_ptr, scale_ptr, out_ptr, N, C, PROGRAMS, BLOCK: tl.constexpr):
    column, width = tl.arange(0, BLOCK), tl.full((1,), C, tl.int64)
    keep = column < C
    for row in tl.range(tl.program_id(0), N, PROGRAMS, num_stages=2):
        at, scale = row * width + column, tl.load(scale_ptr + row)
        normed = tl.load(x_ptr + at, keep, 0.0).to(tl.float32) * scale
        g = tl.load(d_normed_ptr + at, keep, 0.0).to(tl.float32)
        g = (g - normed * (tl.sum(g * normed, 0) / C)) * scale + tl.load(d_x_ptr + at, keep, 0.0).to(tl.float32)
        tl.store(out_ptr + at, g.to(out_ptr.dtype.element_ty), keep)


@torch.library.custom_op("nanochat_hf::stream_norm", mutates_args=())
def stream_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (…, C) → its RMS norm, 1/rms (…) float32."""
    x, C = x.contiguous(), x.shape[-1]
    normed, scale, block = (
        torch.empty_like(x),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
        triton.next_power_of_2(C),
    )
    _norm[(scale.numel(),)](x, normed, scale, C, eps, BLOCK=block, num_warps=warps(block))
    return normed, scale


@stream_norm.register_fake
def _(x, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("nanochat_hf::stream_norm_backward", mutates_args=())
def stream_norm_backward(d_x: Tensor, d_normed: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """d_x and the gradient of x through `stream_norm`, summed."""
    d_x, d_normed, x = d_x.contiguous(), d_normed.contiguous(), x.contiguous()
    out, C, N = torch.empty_like(x), x.shape[-1], scale.numel()
    count, block = programs(x, N), triton.next_power_of_2(C)
    _norm_backward[(count,)](d_x, d_normed, x, scale, out, N, C, count, BLOCK=block, num_warps=warps(block))
    return out


@stream_norm_backward.register_fake
def _(d_x, d_normed, x, scale):
    return x.new_empty(x.shape)


class StreamAndNorm(torch.autograd.Function):
    """x (…, C) → x, its norm. x is returned so that one kernel sums both gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x and its norm; keeps 1/rms of each row."""
        normed, scale = stream_norm(x, eps)
        ctx.save_for_backward(x, scale)
        return x.view_as(x), normed

    @staticmethod
    def backward(ctx, d_x: Tensor, d_normed: Tensor) -> tuple[Tensor, None]:
        """Gradient of x through both results."""
        return stream_norm_backward(d_x, d_normed, *ctx.saved_tensors), None
