"""The residual stream between two layers, x = stream + update and then r·x + s·x0, and its norm, in one pass over memory each way, as Triton kernels.

Letters: N tokens, C hidden_size, F channels that are wanted apart too, r and s a layer's resid and x0 scalars.
"""

import torch
import triton
import triton.language as tl

SMALL = tl.constexpr(1 / 4)  # below this |r|, x is kept; else r·x + s·x0, in which it is, is all that backward needs
PROGRAMS = 8  # a multiprocessor: each sums its share of the scalars' gradients, and loads a row while it counts on the last


@triton.jit
def _forward(
    stream_ptr, update_ptr, x0_ptr, r_ptr, s_ptr, kept_ptr, mixed_ptr, normed_ptr, first_ptr, scale_ptr, C, eps, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at, keep = row * C + column, column < C
    x = tl.load(stream_ptr + at, keep, 0.0).to(tl.float32) + tl.load(update_ptr + at, keep, 0.0).to(tl.float32)
    x, x0, r = x.to(kept_ptr.dtype.element_ty), tl.load(x0_ptr + at, keep, 0.0).to(tl.float32), tl.load(r_ptr)
    mixed = (r * x.to(tl.float32) + tl.load(s_ptr) * x0).to(mixed_ptr.dtype.element_ty)
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
    d_mixed_ptr, d_normed_ptr, d_first_ptr, d_x0_ptr, kept_ptr, mixed_ptr, x0_ptr, r_ptr, s_ptr, scale_ptr, dx_ptr, dx0_ptr, sums_ptr, N, C,
    PROGRAMS, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, column = tl.program_id(0), tl.arange(0, BLOCK)
    keep, r, s, width = column < C, tl.load(r_ptr), tl.load(s_ptr), tl.full((1,), C, tl.int64)
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
        normed = (from_kept * kept + from_x0 * x0).to(dx_ptr.dtype.element_ty).to(tl.float32) * scale  # as forward rounded it
        g = (g - normed * (tl.sum(g * normed, 0) / C)) * scale + tl.load(d_mixed_ptr + at, keep, 0.0).to(tl.float32)
        tl.store(dx_ptr + at, (r * g).to(dx_ptr.dtype.element_ty), keep)
        total = tl.load(d_x0_ptr + at, keep, 0.0).to(tl.float32) + s * g
        tl.store(dx0_ptr + at, total.to(dx0_ptr.dtype.element_ty), keep)
        along += g * kept
        along_x0 += g * x0
    total, total_x0 = tl.sum(along, 0), tl.sum(along_x0, 0)
    tl.store(sums_ptr + program, tl.where(small, total, (total - s * total_x0) / r))  # of g·x, by mixed = r·x + s·x0
    tl.store(sums_ptr + PROGRAMS + program, total_x0)


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


def _warps(block):
    return min(max(block // 512, 1), 16)


def _programs(x, rows):
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    return min(PROGRAMS * multiprocessors, rows)


@torch.library.custom_op("nanochat_hf::mix_and_norm", mutates_args=())
def mix_and_norm(
    stream: torch.Tensor, update: torch.Tensor, x0: torch.Tensor, r: torch.Tensor, s: torch.Tensor, eps: float, channels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """stream, update and x0 (…, C), r and s 0-d float32 → x = stream + update where |r| is small, else nothing that was written; mixed = r·x + s·x0, its
    RMS norm, that norm's first `channels`, 1/rms (…) float32."""
    stream, update, x0 = stream.contiguous(), update.contiguous(), x0.contiguous()
    kept, mixed, normed, C = *(torch.empty_like(stream) for _ in range(3)), stream.shape[-1]
    first = stream.new_empty(*stream.shape[:-1], channels)
    scale = stream.new_empty(stream.shape[:-1], dtype=torch.float32)
    block = triton.next_power_of_2(C)
    _forward[(scale.numel(),)](
        stream, update, x0, r, s, kept, mixed, normed, first, scale, C, eps, F=channels, BLOCK=block, num_warps=_warps(block)
    )  # fmt: skip
    return kept, mixed, normed, first, scale


@mix_and_norm.register_fake
def _(stream, update, x0, r, s, eps, channels):
    same, tokens = [stream.new_empty(stream.shape) for _ in range(3)], stream.shape[:-1]
    return same[0], same[1], same[2], stream.new_empty(*tokens, channels), stream.new_empty(tokens, dtype=torch.float32)


@torch.library.custom_op("nanochat_hf::mix_and_norm_backward", mutates_args=())
def mix_and_norm_backward(
    d_mixed: torch.Tensor, d_normed: torch.Tensor, d_first: torch.Tensor, d_x0: torch.Tensor, kept: torch.Tensor, mixed: torch.Tensor,
    x0: torch.Tensor, r: torch.Tensor, s: torch.Tensor, scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of stream and update, which are one, of x0 with `d_x0` of the layers behind added, and of (r, s), from what `mix_and_norm` was given and gave."""
    d_mixed, d_normed, d_first, d_x0, x0 = (t.contiguous() for t in (d_mixed, d_normed, d_first, d_x0, x0))
    dx, dx0, C, N = torch.empty_like(mixed), torch.empty_like(x0), x0.shape[-1], scale.numel()
    programs, block = _programs(x0, N), triton.next_power_of_2(C)
    sums = x0.new_empty(2, programs, dtype=torch.float32)
    _backward[(programs,)](
        d_mixed, d_normed, d_first, d_x0, kept, mixed, x0, r, s, scale, dx, dx0, sums, N, C, programs, F=d_first.shape[-1], BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return dx, dx0, sums.sum(1)


@mix_and_norm_backward.register_fake
def _(d_mixed, d_normed, d_first, d_x0, kept, mixed, x0, r, s, scale):
    return mixed.new_empty(mixed.shape), x0.new_empty(x0.shape), r.new_empty(2, dtype=torch.float32)


class MixAndNorm(torch.autograd.Function):
    """stream, update and x0 (…, C), r, s → the stream r·(stream + update) + s·x0, its norm, that norm's first `channels`, and x0 for the next layer:
    handed on from layer to layer, its gradient is summed on the way back in the kernel that reads the rest, in place of one sum of as many tensors
    as there are layers. The first channels come apart since their gradient, filled up with zeros, would be as large as the norm."""

    @staticmethod
    def forward(ctx, stream, update, x0, r, s, eps, channels):
        kept, mixed, normed, first, scale = mix_and_norm(stream, update, x0, r, s, eps, channels)
        ctx.save_for_backward(kept, mixed, x0, r, s, scale)
        return mixed, normed, first, x0.view_as(x0)

    @staticmethod
    def backward(ctx, d_mixed, d_normed, d_first, d_x0):
        kept, mixed, x0, r, s, scale = ctx.saved_tensors
        dx, dx0, sums = mix_and_norm_backward(d_mixed, d_normed, d_first, d_x0, kept, mixed, x0, r, s, scale)
        return dx, dx, dx0, sums[0].to(r.dtype), sums[1].to(s.dtype), None, None


@torch.library.custom_op("nanochat_hf::stream_norm", mutates_args=())
def stream_norm(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x (…, C) → its RMS norm, 1/rms (…) float32."""
    x, C = x.contiguous(), x.shape[-1]
    normed, scale, block = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32), triton.next_power_of_2(C)
    _norm[(scale.numel(),)](x, normed, scale, C, eps, BLOCK=block, num_warps=_warps(block))
    return normed, scale


@stream_norm.register_fake
def _(x, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("nanochat_hf::stream_norm_backward", mutates_args=())
def stream_norm_backward(d_x: torch.Tensor, d_normed: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """d_x and the gradient of x through `stream_norm`, summed."""
    d_x, d_normed, x = d_x.contiguous(), d_normed.contiguous(), x.contiguous()
    out, C, N = torch.empty_like(x), x.shape[-1], scale.numel()
    programs, block = _programs(x, N), triton.next_power_of_2(C)
    _norm_backward[(programs,)](d_x, d_normed, x, scale, out, N, C, programs, BLOCK=block, num_warps=_warps(block))
    return out


@stream_norm_backward.register_fake
def _(d_x, d_normed, x, scale):
    return x.new_empty(x.shape)


class StreamAndNorm(torch.autograd.Function):
    """x (…, C) → x, its norm: x is handed on, so that both gradients meet in one kernel."""

    @staticmethod
    def forward(ctx, x, eps):
        normed, scale = stream_norm(x, eps)
        ctx.save_for_backward(x, scale)
        return x.view_as(x), normed

    @staticmethod
    def backward(ctx, d_x, d_normed):
        return stream_norm_backward(d_x, d_normed, *ctx.saved_tensors), None
