"""RoPE and QK norm of queries and keys in one pass over memory, as Triton kernels.

Letters: B rows, T positions, N = B·T tokens, H query heads, K key/value heads, D head_dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_hf.model.configuration_nanochat_hf import NanochatConfig

# Tokens of a program, which computes one head: with D = 128 it reads and writes 8 KiB. The programs of a token's heads
# are neighbours.
TOKENS = 32


@triton.jit
def _forward(
    x_ptr,
    rope_ptr,
    q_ptr,
    k_ptr,
    scale_ptr,
    tokens,
    period,
    plane,
    q_heads,
    k_heads,
    eps,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
):
    program, heads = tl.program_id(0), q_heads + k_heads
    token, head = program // heads * TOKENS + tl.arange(0, TOKENS), program % heads
    live, position = token < tokens, token % period
    keep, half, token = live[:, None], tl.arange(0, D // 2)[None, :], token.to(tl.int64)
    source = x_ptr + (token * (q_heads + k_heads) + head)[:, None] * D + half
    angle = rope_ptr + position[:, None] * (D // 2) + half
    x1 = tl.load(source, keep, 0.0).to(tl.float32)
    x2 = tl.load(source + D // 2, keep, 0.0).to(tl.float32)
    cos = tl.load(angle, keep, 0.0).to(tl.float32)
    sin = tl.load(angle + plane, keep, 0.0).to(tl.float32)
    y1, y2 = x1 * cos + x2 * sin, x2 * cos - x1 * sin
    # the norm of the rotated vector: with rounded cosines and sines, rotation changes lengths a little
    scale = tl.rsqrt((tl.sum(y1 * y1, 1) + tl.sum(y2 * y2, 1)) / D + eps)
    if head < q_heads:
        target = q_ptr + (token * q_heads + head)[:, None] * D + half
    else:
        target = k_ptr + (token * k_heads + head - q_heads)[:, None] * D + half
    tl.store(target, (y1 * scale[:, None]).to(q_ptr.dtype.element_ty), keep)
    tl.store(target + D // 2, (y2 * scale[:, None]).to(q_ptr.dtype.element_ty), keep)
    tl.store(scale_ptr + token * (q_heads + k_heads) + head, scale, live)


@triton.jit
def _backward(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    q_ptr,
    k_ptr,
    rope_ptr,
    scale_ptr,
    dx_ptr,
    tokens,
    positions,
    period,
    plane,
    q_heads,
    k_heads,
    v_heads,
    q_token,
    k_token,
    dx_token,
    dq_row,
    dq_token,
    dq_head,
    dk_row,
    dk_token,
    dk_head,
    dv_row,
    dv_token,
    dv_head,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
):
    program, heads = tl.program_id(0), q_heads + k_heads + v_heads
    token, head = program // heads * TOKENS + tl.arange(0, TOKENS), program % heads
    live, half = token < tokens, tl.arange(0, D // 2)[None, :]
    keep = live[:, None]
    row, position, place = (
        (token // positions).to(tl.int64),
        (token % positions).to(tl.int64),
        (token % period)[:, None],
    )
    token = token.to(tl.int64)
    target = dx_ptr + (token * dx_token + head * D)[:, None] + half
    if head >= q_heads + k_heads:  # the gradient of a value is copied
        gradient = dv_ptr + (row * dv_row + position * dv_token + (head - q_heads - k_heads) * dv_head)[:, None] + half
        tl.store(target, tl.load(gradient, keep, 0.0), keep)
        tl.store(target + D // 2, tl.load(gradient + D // 2, keep, 0.0), keep)
        return
    if head < q_heads:
        gradient = dq_ptr + (row * dq_row + position * dq_token + head * dq_head)[:, None] + half
        output = q_ptr + (token * q_token + head * D)[:, None] + half
    else:
        gradient = dk_ptr + (row * dk_row + position * dk_token + (head - q_heads) * dk_head)[:, None] + half
        output = k_ptr + (token * k_token + (head - q_heads) * D)[:, None] + half
    angle = rope_ptr + place * (D // 2) + half
    g1 = tl.load(gradient, keep, 0.0).to(tl.float32)
    g2 = tl.load(gradient + D // 2, keep, 0.0).to(tl.float32)
    y1 = tl.load(output, keep, 0.0).to(tl.float32)
    y2 = tl.load(output + D // 2, keep, 0.0).to(tl.float32)
    cos = tl.load(angle, keep, 0.0).to(tl.float32)
    sin = tl.load(angle + plane, keep, 0.0).to(tl.float32)
    scale = tl.load(scale_ptr + token * (q_heads + k_heads) + head, live, 0.0)[:, None]
    # backward of the norm: the part of the gradient along the normed vector vanishes
    along = ((tl.sum(g1 * y1, 1) + tl.sum(g2 * y2, 1)) / D)[:, None]
    g1, g2 = (g1 - y1 * along) * scale, (g2 - y2 * along) * scale
    tl.store(target, (g1 * cos - g2 * sin).to(dx_ptr.dtype.element_ty), keep)
    tl.store(target + D // 2, (g1 * sin + g2 * cos).to(dx_ptr.dtype.element_ty), keep)


@torch.library.custom_op("nanochat_hf::rope_norm", mutates_args=())
def rope_norm_forward(
    x: torch.Tensor, rope: torch.Tensor, q_heads: int, k_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (B, T, (H + K)·D), angles (2, B or 1, T, 1, D/2) → q (B, T, H, D), k (B, T, K, D), 1/rms (B, T, H + K)."""
    B, T, width = x.shape
    D = width // (q_heads + k_heads)
    x = x.contiguous()
    q, k = x.new_empty(B, T, q_heads, D), x.new_empty(B, T, k_heads, D)
    scale = x.new_empty(B, T, q_heads + k_heads, dtype=torch.float32)
    grid = (triton.cdiv(B * T, TOKENS) * (q_heads + k_heads),)
    eps = torch.finfo(torch.float32).eps  # as in F.rms_norm, which computes in float32
    _forward[grid](
        x,
        rope,
        q,
        k,
        scale,
        B * T,
        rope.shape[1] * T,
        rope[0].numel(),
        q_heads,
        k_heads,
        eps,
        D=D,
        TOKENS=TOKENS,
        num_warps=4,
    )
    return q, k, scale


@rope_norm_forward.register_fake
def _(x, rope, q_heads, k_heads):
    B, T, width = x.shape
    D = width // (q_heads + k_heads)
    scale = x.new_empty(B, T, q_heads + k_heads, dtype=torch.float32)
    return x.new_empty(B, T, q_heads, D), x.new_empty(B, T, k_heads, D), scale


@torch.library.custom_op("nanochat_hf::rope_norm_backward", mutates_args=())
def rope_norm_backward(
    dq: torch.Tensor, dk: torch.Tensor, q: torch.Tensor, k: torch.Tensor, scale: torch.Tensor, rope: torch.Tensor
) -> torch.Tensor:
    """Gradient with respect to x of `rope_norm_forward`, from its outputs alone, so that x need not be kept."""
    B, T, q_heads, D = q.shape
    dx = q.new_empty(B, T, (q_heads + k.shape[2]) * D)
    write_gradient(dx, dq, dk, None, q.contiguous(), k.contiguous(), scale, rope)
    return dx


def write_gradient(
    dx: Tensor, dq: Tensor, dk: Tensor, dv: Tensor | None, q: Tensor, k: Tensor, scale: Tensor, rope: Tensor
) -> None:
    """Write the gradients before rotation and norm, of q (B, T, H, D) and k (B, T, K, D), into dx (B, T, ≥ (H + K)·D).

    dv (B, T, K, D), where given, is copied after them. dq and dk may be views of their places in dx. The rows of q, k
    and dx (axis B) follow one another without gaps; their tokens may be parts of wider ones.
    """
    B, T, q_heads, D = q.shape
    k_heads, values = k.shape[2], 0 if dv is None else dv.shape[2]
    dq, dk = (g if g.stride(-1) == 1 else g.contiguous() for g in (dq, dk))
    if dv is None:
        dv = dq  # any tensor will do: with 0 heads of values it is not read
    elif dv.stride(-1) != 1:
        dv = dv.contiguous()
    grid = (triton.cdiv(B * T, TOKENS) * (q_heads + k_heads + values),)
    _backward[grid](
        dq,
        dk,
        dv,
        q,
        k,
        rope,
        scale,
        dx,
        B * T,
        T,
        rope.shape[1] * T,
        rope[0].numel(),
        q_heads,
        k_heads,
        values,
        q.stride(1),
        k.stride(1),
        dx.stride(1),
        *dq.stride()[:3],
        *dk.stride()[:3],
        *dv.stride()[:3],
        D=D,
        TOKENS=TOKENS,
        num_warps=4,
    )


@rope_norm_backward.register_fake
def _(dq, dk, q, k, scale, rope):
    B, T, q_heads, D = q.shape
    return q.new_empty(B, T, (q_heads + k.shape[2]) * D)


def lacks_formula(config: NanochatConfig) -> str | None:
    """Why these kernels do not compute the formula of this configuration."""
    if not config.rope_in_bfloat16:
        return "rope tables are not rounded to bfloat16"
    if config.rms_norm_eps is not None:
        return f"rms_norm_eps={config.rms_norm_eps} is not the dtype's own"
    return None if config.head_dim & (config.head_dim - 1) == 0 else f"head_dim={config.head_dim} is no power of 2"


class RopeNorm(torch.autograd.Function):
    """Queries and keys, rotated and then normed."""

    @staticmethod
    def forward(ctx, x: Tensor, rope: Tensor, q_heads: int, k_heads: int) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D) and k (B, T, K, D); keeps both, and one float for each head."""
        q, k, scale = rope_norm_forward(x, rope, q_heads, k_heads)
        ctx.save_for_backward(q, k, scale, rope)
        return q, k

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of x (B, T, (H + K)·D)."""
        q, k, scale, rope = ctx.saved_tensors
        return rope_norm_backward(dq, dk, q, k, scale, rope), None, None, None
