"""The stream between two layers, r·(x + update) + s·x0, and its norm, in one pass over memory each way.

Letters: N tokens, C hidden_size, F channels of the norm that are returned separately too, r and s a layer's two
scalars.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_hf.model.configuration_nanochat_hf import NanochatConfig

from ..lib.devices import lacks_triton
from ..lib.rows import epsilon, programs, warps

OP = "mix_and_norm"
# Backward needs x + update. Forward keeps it where |r| is below this; else backward solves r·(x + update) + s·x0 for
# it.
SMALL = tl.constexpr(1 / 4)


def fits(config: NanochatConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """None on a GPU with Triton."""
    return lacks_triton(device)


def run(
    x: Tensor, update: Tensor, x0: Tensor, lambdas: Tensor, eps: float | None, channels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stream, its norm, the norm's first channels, and x0."""
    # Before the first layer x is x0, so x0 goes in as a view: torch.compile refuses a tensor that is given twice, and
    # torch 2.11 silently dropped one of its gradients.
    return MixAndNorm.apply(x, update, x0.view_as(x0), lambdas, epsilon(eps), channels)


@triton.jit
def _forward(
    stream_ptr,
    update_ptr,
    x0_ptr,
    lambdas_ptr,
    kept_ptr,
    mixed_ptr,
    normed_ptr,
    first_ptr,
    scale_ptr,
    C,
    eps,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at, keep = row * C + column, column < C
    x = tl.load(stream_ptr + at, keep, 0.0).to(tl.float32) + tl.load(update_ptr + at, keep, 0.0).to(tl.float32)
    x, x0, r = x.to(kept_ptr.dtype.element_ty), tl.load(x0_ptr + at, keep, 0.0).to(tl.float32), tl.load(lambdas_ptr)
    mixed = (r * x.to(tl.float32) + tl.load(lambdas_ptr + 1) * x0).to(mixed_ptr.dtype.element_ty)
    if tl.abs(r) < SMALL:
        tl.store(kept_ptr + at, x, keep)
    tl.store(mixed_ptr + at, mixed, keep)
    mixed = mixed.to(tl.float32)
    scale = tl.rsqrt(tl.sum(mixed * mixed, 0) / C + eps)
    normed = (mixed * scale).to(normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + at, normed, keep)
    if F:
        tl.store(first_ptr + row * F + column, normed, column < F)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _backward(
    d_mixed_ptr,
    d_normed_ptr,
    d_first_ptr,
    d_x0_ptr,
    kept_ptr,
    mixed_ptr,
    x0_ptr,
    lambdas_ptr,
    scale_ptr,
    dx_ptr,
    dx0_ptr,
    sums_ptr,
    N,
    C,
    PROGRAMS,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, column = tl.program_id(0), tl.arange(0, BLOCK)
    keep, r, s, width = column < C, tl.load(lambdas_ptr), tl.load(lambdas_ptr + 1), tl.full((1,), C, tl.int64)
    along, along_x0 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    small = tl.abs(r) < SMALL
    source = tl.where(small, kept_ptr, mixed_ptr)
    from_kept, from_x0 = tl.where(small, r, 1.0), tl.where(small, s, 0.0)
    for row in tl.range(program, N, PROGRAMS, num_stages=2):
        at = row * width + column
        kept, x0 = tl.load(source + at, keep, 0.0).to(tl.float32), tl.load(x0_ptr + at, keep, 0.0).to(tl.float32)
        scale, g = tl.load(scale_ptr + row), tl.load(d_normed_ptr + at, keep, 0.0).to(tl.float32)
        if F:
            g += tl.load(d_first_ptr + row * F + column, column < F, 0.0).to(tl.float32)
        mixed = (from_kept * kept + from_x0 * x0).to(dx_ptr.dtype.element_ty)  # rounded as in forward
        normed = mixed.to(tl.float32) * scale
        g = (g - normed * (tl.sum(g * normed, 0) / C)) * scale + tl.load(d_mixed_ptr + at, keep, 0.0).to(tl.float32)
        tl.store(dx_ptr + at, (r * g).to(dx_ptr.dtype.element_ty), keep)
        total = tl.load(d_x0_ptr + at, keep, 0.0).to(tl.float32) + s * g
        tl.store(dx0_ptr + at, total.to(dx0_ptr.dtype.element_ty), keep)
        along += g * kept
        along_x0 += g * x0
    total, total_x0 = tl.sum(along, 0), tl.sum(along_x0, 0)
    tl.store(sums_ptr + program, tl.where(small, total, (total - s * total_x0) / r))  # of g·x, by mixed = r·x + s·x0
    tl.store(sums_ptr + PROGRAMS + program, total_x0)


@torch.library.custom_op("nanochat_hf::mix_and_norm", mutates_args=())
def mix_and_norm(
    stream: Tensor, update: Tensor, x0: Tensor, lambdas: Tensor, eps: float, channels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, update and x0 (…, C), lambdas (2) float32 → five tensors.

    kept = x + update, written only where |r| is small; mixed = r·(x + update) + s·x0; its RMS norm; that norm's first
    `channels`; 1/rms (…) float32.
    """
    stream, update, x0 = stream.contiguous(), update.contiguous(), x0.contiguous()
    kept, mixed, normed, C = *(torch.empty_like(stream) for _ in range(3)), stream.shape[-1]
    first = stream.new_empty(*stream.shape[:-1], channels)
    scale = stream.new_empty(stream.shape[:-1], dtype=torch.float32)
    block = triton.next_power_of_2(C)
    _forward[(scale.numel(),)](
        stream,
        update,
        x0,
        lambdas,
        kept,
        mixed,
        normed,
        first,
        scale,
        C,
        eps,
        F=channels,
        BLOCK=block,
        num_warps=warps(block),
    )
    return kept, mixed, normed, first, scale


@mix_and_norm.register_fake
def _(stream, update, x0, lambdas, eps, channels):
    same, tokens = [stream.new_empty(stream.shape) for _ in range(3)], stream.shape[:-1]
    return same[0], same[1], same[2], stream.new_empty(*tokens, channels), stream.new_empty(tokens, dtype=torch.float32)


@torch.library.custom_op("nanochat_hf::mix_and_norm_backward", mutates_args=())
def mix_and_norm_backward(
    d_mixed: Tensor,
    d_normed: Tensor,
    d_first: Tensor,
    d_x0: Tensor,
    kept: Tensor,
    mixed: Tensor,
    x0: Tensor,
    lambdas: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and update (the same), of x0 including the later layers' `d_x0`, and of lambdas (2)."""
    d_mixed, d_normed, d_first, d_x0, x0 = (t.contiguous() for t in (d_mixed, d_normed, d_first, d_x0, x0))
    dx, dx0, C, N = torch.empty_like(mixed), torch.empty_like(x0), x0.shape[-1], scale.numel()
    count, block = programs(x0, N), triton.next_power_of_2(C)
    sums = x0.new_empty(2, count, dtype=torch.float32)
    _backward[(count,)](
        d_mixed,
        d_normed,
        d_first,
        d_x0,
        kept,
        mixed,
        x0,
        lambdas,
        scale,
        dx,
        dx0,
        sums,
        N,
        C,
        count,
        F=d_first.shape[-1],
        BLOCK=block,
        num_warps=warps(block),
    )
    return dx, dx0, sums.sum(1)


@mix_and_norm_backward.register_fake
def _(d_mixed, d_normed, d_first, d_x0, kept, mixed, x0, lambdas, scale):
    return mixed.new_empty(mixed.shape), x0.new_empty(x0.shape), lambdas.new_empty(2)


class MixAndNorm(torch.autograd.Function):
    """x, update and x0 (…, C), lambdas (2) → the stream, its norm, the norm's first `channels`, and x0.

    x0 is passed on from layer to layer, so that each layer's backward kernel adds its part of the gradient of x0.
    Otherwise autograd would sum one tensor for each layer. The first channels are a result of their own because the
    gradient of a slice is padded with zeros to the size of the norm.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, update: Tensor, x0: Tensor, lambdas: Tensor, eps: float, channels: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four results; keeps the stream, or x + update where |r| is small."""
        kept, mixed, normed, first, scale = mix_and_norm(x, update, x0, lambdas, eps, channels)
        ctx.save_for_backward(kept, mixed, x0, lambdas, scale)
        return mixed, normed, first, x0.view_as(x0)

    @staticmethod
    def backward(ctx, d_mixed: Tensor, d_normed: Tensor, d_first: Tensor, d_x0: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, update, x0 and lambdas."""
        kept, mixed, x0, lambdas, scale = ctx.saved_tensors
        dx, dx0, d_lambdas = mix_and_norm_backward(d_mixed, d_normed, d_first, d_x0, kept, mixed, x0, lambdas, scale)
        return dx, dx, dx0, d_lambdas.to(lambdas.dtype), None, None
