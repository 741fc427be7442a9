"""Queries, keys and values by one product, rotated and normed while they are in registers. For Hopper.

Letters: B rows, T positions, N = B·T tokens, C hidden_size, H query heads, K key/value heads, D head_dim,
W = (H + 2K)·D (docs/records/2026-11-26-one-product-for-qkv).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_hf.model.ops_nanochat_hf import Heads

from .hopper import COLUMNS, descriptors_and_tiles, halves
from .rotation import write_gradient
from .weights import add_weight_gradient, computing, weight_of

GROUP = 4  # rows of tiles that are computed together, so that the weights' tiles stay in the cache


@triton.jit
def _turned(
    part,
    token,
    live,
    head,
    cos,
    sin,
    scale_ptr,
    rotated,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    MIXED: tl.constexpr,
):
    # part (ROWS, COLUMNS): whole heads, the first is `head`. Heads from `rotated` on do not change: cos is 1, sin is 0.
    HEADS: tl.constexpr = COLUMNS // D
    x1, x2 = part.reshape(ROWS, HEADS, 2, D // 2).permute(0, 1, 3, 2).split()
    head += tl.arange(0, HEADS)
    turned = head < rotated
    cos, sin = cos.to(tl.float32)[:, None, :], sin.to(tl.float32)[:, None, :]
    if MIXED:  # tiles may hold heads of both kinds
        cos, sin = tl.where(turned[None, :, None], cos, 1.0), tl.where(turned[None, :, None], sin, 0.0)
    y1, y2 = x1 * cos + x2 * sin, x2 * cos - x1 * sin
    # the norm of the rotated vector: with rounded cosines and sines, rotation changes lengths a little
    scale = tl.rsqrt((tl.sum(y1 * y1, 2) + tl.sum(y2 * y2, 2)) / D + eps)
    tl.store(scale_ptr + token[:, None] * rotated + head[None, :], scale, turned[None, :] & live[:, None])
    if MIXED:
        scale = tl.where(turned[None, :], scale, 1.0)
    scale = scale[:, :, None]
    return tl.join(y1 * scale, y2 * scale).permute(0, 1, 3, 2).reshape(ROWS, COLUMNS)


@triton.jit
def _gated(
    part,
    token,
    live,
    row,
    column,
    gate_ptr,
    table_ptr,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
):
    # part (ROWS, COLUMNS): values from `column` on, to which the gated row of each token is added
    HEADS: tl.constexpr = COLUMNS // D
    at, head, heads = column + tl.arange(0, COLUMNS), column // D + tl.arange(0, HEADS), width // D
    rows = tl.load(table_ptr + row[:, None] * width + at[None, :], live[:, None] & (at < width)[None, :], 0.0).to(
        tl.float32
    )
    gate = tl.load(gate_ptr + token[:, None] * heads + head[None, :], live[:, None] & (head < heads)[None, :], 0.0).to(
        tl.float32
    )
    return (part.reshape(ROWS, HEADS, D) + gate[:, :, None] * rows.reshape(ROWS, HEADS, D)).reshape(ROWS, COLUMNS)


@triton.jit
def _corner(tile, down, across, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    # first row and column of a tile; within GROUP rows of tiles the order is column after column
    first = tile // (GROUP * across) * GROUP
    size = min(down - first, GROUP)
    return (first + tile % (GROUP * across) % size) * ROWS, tile % (GROUP * across) // size * COLUMNS


@triton.jit
def _product_of(x_desc, w_desc, row, column, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, C, DEPTH):
        product = tl.dot(x_desc.load([row, start]), w_desc.load([column, start]).T, product)
    return halves(product, ROWS, COLUMNS)


@triton.jit
def _project(
    x_desc,
    w_desc,
    out_desc,
    rope_ptr,
    scale_ptr,
    gate_ptr,
    table_ptr,
    id_ptr,
    N,
    W,
    C,
    period,
    plane,
    rotated,
    eps,
    D: tl.constexpr,
    MIXED: tl.constexpr,
    WHOLE: tl.constexpr,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    down, turning = tl.cdiv(N, ROWS), tl.cdiv(rotated * D, COLUMNS)
    for tile in tl.range(tl.program_id(0), down * turning, PROGRAMS, flatten=True):
        row, column = _corner(tile, down, turning, ROWS, COLUMNS, GROUP)
        left, right = _product_of(x_desc, w_desc, row, column, C, ROWS, COLUMNS, DEPTH)
        half, head = COLUMNS // 2, column // D
        token = row + tl.arange(0, ROWS)
        live = token < N
        if WHOLE:  # noqa: SIM108  the tile's tokens are of one row, so their positions are contiguous
            position = row % period + tl.arange(0, ROWS)
        else:
            position = token % period
        angle = rope_ptr + position[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
        cos, sin = tl.load(angle, live[:, None], 1.0), tl.load(angle + plane, live[:, None], 0.0)
        token = token.to(tl.int64)
        left = _turned(left, token, live, head, cos, sin, scale_ptr, rotated, eps, ROWS, COLUMNS // 2, D, MIXED)
        out_desc.store([row, column], left.to(out_desc.dtype))
        right = _turned(
            right, token, live, head + half // D, cos, sin, scale_ptr, rotated, eps, ROWS, COLUMNS // 2, D, MIXED
        )
        out_desc.store([row, column + half], right.to(out_desc.dtype))
    # tiles of values alone, beginning with the programs that had one tile less above
    plain, program = tl.cdiv(W, COLUMNS) - turning, (tl.program_id(0) + PROGRAMS - down * turning % PROGRAMS) % PROGRAMS
    for tile in tl.range(program, down * plain, PROGRAMS, flatten=True):
        row, column = _corner(tile, down, plain, ROWS, COLUMNS, GROUP)
        value, column = column, column + turning * COLUMNS
        left, right = _product_of(x_desc, w_desc, row, column, C, ROWS, COLUMNS, DEPTH)
        if GATED:  # the first value is then the first column of a tile
            token, width = row + tl.arange(0, ROWS), W - rotated * D
            number, live = tl.load(id_ptr + token, token < N, 0).to(tl.int64), token < N
            left = _gated(left, token, live, number, value, gate_ptr, table_ptr, width, ROWS, COLUMNS // 2, D)
            right = _gated(
                right, token, live, number, value + COLUMNS // 2, gate_ptr, table_ptr, width, ROWS, COLUMNS // 2, D
            )
        out_desc.store([row, column], left.to(out_desc.dtype))
        out_desc.store([row, column + COLUMNS // 2], right.to(out_desc.dtype))


def adds(rotated: int, head_dim: int) -> bool:
    """Whether `rotated_projections` can add to the values: no tile may hold both keys and values."""
    return rotated * head_dim % COLUMNS == 0


@torch.library.custom_op("nanochat_hf::rotated_projections", mutates_args=())
def rotated_projections(
    x: torch.Tensor,
    w: torch.Tensor,
    rope: torch.Tensor,
    rotated: int,
    head_dim: int,
    gate: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, T, C), w (W, C), angles (2, B or 1, T, 1, D/2) → x·wᵀ (B, T, W), 1/rms (B, T, rotated) float32.

    The first `rotated` heads are rotated and normed. With gate (B, T, K), table (V, K·D) and ids (B, T),
    gate·table[ids] is added to the last K heads, which needs `adds`.
    """
    B, T, C = x.shape
    out, scale = x.new_empty(B, T, w.shape[0]), x.new_empty(B, T, rotated, dtype=torch.float32)
    flat = x.reshape(-1, C)
    descriptors, tiles = descriptors_and_tiles(flat, w.contiguous(), out.view(-1, w.shape[0]))
    eps = torch.finfo(torch.float32).eps  # as in F.rms_norm, which computes in float32
    period = rope.shape[1] * T
    kinds = dict(MIXED=not adds(rotated, head_dim), WHOLE=period % tiles["ROWS"] == 0, GATED=gate is not None)
    # without a gate the kernel reads none of the three. Rows in float32 would not fit into shared memory beside the
    # tiles.
    if gate is None or table is None or ids is None:
        lookup = rope, rope, rope
    else:
        lookup = gate.contiguous(), table.to(gate.dtype).contiguous(), ids.contiguous()
    _project[(tiles["PROGRAMS"],)](
        *descriptors,
        rope,
        scale,
        *lookup,
        B * T,
        w.shape[0],
        C,
        period,
        rope[0].numel(),
        rotated,
        eps,
        D=head_dim,
        **kinds,
        GROUP=GROUP,
        **tiles,
        num_warps=8,
        num_stages=3,
    )
    return out, scale


@rotated_projections.register_fake
def _(x, w, rope, rotated, head_dim, gate=None, table=None, ids=None):
    B, T, _ = x.shape
    return x.new_empty(B, T, w.shape[0]), x.new_empty(B, T, rotated, dtype=torch.float32)


def parts(qkv: Tensor, heads: int, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, W) → q (B, T, H, D), k and v (B, T, K, D), views."""
    return qkv.unflatten(-1, (heads + 2 * key_heads, -1)).split((heads, key_heads, key_heads), dim=2)


@torch.library.custom_op("nanochat_hf::rotated_backward", mutates_args=())
def rotated_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    qkv: torch.Tensor,
    scale: torch.Tensor,
    rope: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """Gradient (B, T, W) of the product x·wᵀ, from the gradients of q, k and v and the results of the forward pass."""
    q, k, _ = parts(qkv, heads, dk.shape[2])
    gradient = torch.empty_like(qkv)
    write_gradient(gradient, dq, dk, dv, q, k, scale, rope)
    return gradient


@rotated_backward.register_fake
def _(dq, dk, dv, qkv, scale, rope, heads):
    return qkv.new_empty(qkv.shape)


def head_counts(heads: Heads) -> tuple[int, int]:
    """Query heads and key/value heads."""
    return weight_of(heads.q_proj).shape[0] // heads.head_dim, weight_of(heads.k_proj).shape[0] // heads.head_dim


def forward_product(
    ctx, x: Tensor, weights: Sequence[Tensor | None], rope: Tensor, counts: tuple[int, int], *lookup: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, w, result, 1/rms) of `rotated_projections` in autocast's dtype; ctx keeps what `backward_product` needs.

    weights: those of q, k and v, or the joint one, None and None. counts: query heads, key/value heads. lookup:
    nothing, or gate, table and ids.
    """
    dtype, given = computing(x), [weight for weight in weights if weight is not None]
    ctx.dtypes, ctx.heads = (x.dtype, given[0].dtype), counts[0]
    ctx.sizes = [weight.shape[0] for weight in given]
    x, w = x.to(dtype), (torch.cat(given) if len(given) > 1 else given[0]).to(dtype)
    head_dim = w.shape[0] // (counts[0] + 2 * counts[1])
    return x, w, *rotated_projections(x, w, rope, sum(counts), head_dim, *lookup)


def backward_product(
    ctx, gradient: Tensor, x: Tensor, w: Tensor, total: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x and of the weights from that of the product; `total`, if given, gets those of the weights."""
    with torch.autocast(x.device.type, enabled=False):
        factors = gradient.flatten(0, -2), x.flatten(0, -2)
        dx = (gradient @ w).to(ctx.dtypes[0])
        if total is None:
            return dx, *(factors[0].mT @ factors[1]).to(ctx.dtypes[1]).split(ctx.sizes)
        add_weight_gradient(total, *factors)
        return dx, None, None, None
