"""Products of the MLP that apply the squared ReLU or its slope while the result is in registers. For Hopper.

Letters: N tokens, C hidden_size, W intermediate_size.
"""

import torch
import triton
import triton.language as tl

from . import cudnn_products
from .hopper import descriptors_and_tiles, halves


@triton.jit
def _squared_relu(
    x_desc,
    w_desc,
    out_desc,
    N,
    W,
    C,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    across = tl.cdiv(W, COLUMNS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, ROWS) * across, PROGRAMS, flatten=True):
        row, column = tile // across * ROWS, tile % across * COLUMNS
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, C, DEPTH):
            product = tl.dot(x_desc.load([row, start]), w_desc.load([column, start]).T, product)
        left, right = halves(product, ROWS, COLUMNS)
        left, right = tl.maximum(left, 0.0), tl.maximum(right, 0.0)
        out_desc.store([row, column], (left * left).to(out_desc.dtype))
        out_desc.store([row, column + COLUMNS // 2], (right * right).to(out_desc.dtype))


@triton.jit
def _slope(
    dy_desc,
    w_desc,
    a_desc,
    out_desc,
    N,
    W,
    C,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    across = tl.cdiv(W, COLUMNS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, ROWS) * across, PROGRAMS, flatten=True):
        row, column = tile // across * ROWS, tile % across * COLUMNS
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, C, DEPTH):
            product = tl.dot(dy_desc.load([row, start]), w_desc.load([start, column]), product)
        left, right = halves(product, ROWS, COLUMNS)
        left *= 2.0 * tl.sqrt(a_desc.load([row, column]).to(tl.float32))
        out_desc.store([row, column], left.to(out_desc.dtype))
        right *= 2.0 * tl.sqrt(a_desc.load([row, column + COLUMNS // 2]).to(tl.float32))
        out_desc.store([row, column + COLUMNS // 2], right.to(out_desc.dtype))


def _launch(kernel, narrow, wide, weight, turned, *kept):
    # narrow (N, C) · weight → (N, W) like wide
    out = torch.empty(narrow.shape[0], wide, dtype=narrow.dtype, device=narrow.device)
    descriptors, tiles = descriptors_and_tiles(narrow, weight, *kept, out, turned=turned)
    kernel[(tiles["PROGRAMS"],)](*descriptors, *out.shape, narrow.shape[1], **tiles, num_warps=8, num_stages=3)
    return out


@torch.library.custom_op("nanochat_hf::squared_relu_up", mutates_args=())
def squared_relu_up(x: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """relu(x·upᵀ)² of x (N, C) and up (W, C) → (N, W), in their dtype, rounded only after the square."""
    return _launch(_squared_relu, x.contiguous(), up.shape[0], up.contiguous(), True)


@squared_relu_up.register_fake
def _(x, up):
    return x.new_empty(x.shape[0], up.shape[0])


@torch.library.custom_op("nanochat_hf::squared_relu_down_backward", mutates_args=())
def squared_relu_down_backward(dy: torch.Tensor, down: torch.Tensor, squared: torch.Tensor) -> torch.Tensor:
    """The gradient before the squared ReLU, (dy·down)·2·√squared: dy (N, C), down (C, W), squared (N, W) → (N, W)."""
    dy, down, squared = dy.contiguous(), down.contiguous(), squared.contiguous()
    by_cudnn = cudnn_products.slope(dy, down, squared)
    return _launch(_slope, dy, down.shape[1], down, False, squared) if by_cudnn is None else by_cudnn


@squared_relu_down_backward.register_fake
def _(dy, down, squared):
    return torch.empty_like(squared)
