"""Products of the MLP with the squared ReLU, or its slope, taken while the result lies in registers. For Hopper, by TMA.

Letters: N tokens, C hidden_size, W = 4C intermediate_size.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .cudnn_products import slope

ROWS, COLUMNS, DEPTH = 128, 256, 64  # a tile of the result, and how much of the inner axis a step multiplies
SUITS = 8  # row lengths in elements: TMA wants multiples of 16 bytes


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def _squared_relu(x_desc, w_desc, out_desc, N, W, C, PROGRAMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    across = tl.cdiv(W, COLUMNS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, ROWS) * across, PROGRAMS, flatten=True):
        row, column = tile // across * ROWS, tile % across * COLUMNS
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, C, DEPTH):
            product = tl.dot(x_desc.load([row, start]), w_desc.load([column, start]).T, product)
        left, right = _halves(product, ROWS, COLUMNS)
        left, right = tl.maximum(left, 0.0), tl.maximum(right, 0.0)
        out_desc.store([row, column], (left * left).to(out_desc.dtype))
        out_desc.store([row, column + COLUMNS // 2], (right * right).to(out_desc.dtype))


@triton.jit
def _slope(
    dy_desc, w_desc, a_desc, out_desc, N, W, C, PROGRAMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(W, COLUMNS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, ROWS) * across, PROGRAMS, flatten=True):
        row, column = tile // across * ROWS, tile % across * COLUMNS
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, C, DEPTH):
            product = tl.dot(dy_desc.load([row, start]), w_desc.load([start, column]), product)
        left, right = _halves(product, ROWS, COLUMNS)
        left *= 2.0 * tl.sqrt(a_desc.load([row, column]).to(tl.float32))
        out_desc.store([row, column], left.to(out_desc.dtype))
        right *= 2.0 * tl.sqrt(a_desc.load([row, column + COLUMNS // 2]).to(tl.float32))
        out_desc.store([row, column + COLUMNS // 2], right.to(out_desc.dtype))


def suits(x: torch.Tensor, *widths: int) -> bool:
    """Whether these kernels serve tensors like `x`: half precision on Hopper, rows of `widths` elements. Later GPUs have TMA too, but some
    less shared memory, and nobody has measured them."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return half and x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9 and all(width % SUITS == 0 for width in widths)


def descriptors_and_programs(narrow, weight, *wide, turned=True):
    """Descriptors of narrow (N, C), of its weight, (W, C) where `turned` or (C, W), and of `wide` (N, W) tensors; keywords of the tiles. One program a
    multiprocessor, each of which walks over the tiles."""
    half = [ROWS, COLUMNS // 2]  # what a program holds of the result beside the accumulators
    descriptors = [TensorDescriptor.from_tensor(narrow, [ROWS, DEPTH])]
    descriptors += [TensorDescriptor.from_tensor(weight, [COLUMNS, DEPTH] if turned else [DEPTH, COLUMNS])]
    descriptors += [TensorDescriptor.from_tensor(tensor, half) for tensor in wide]
    programs = torch.cuda.get_device_properties(narrow.device).multi_processor_count if narrow.is_cuda else 2
    return descriptors, dict(PROGRAMS=programs, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH)


def _launch(kernel, narrow, wide, weight, turned, *kept):
    # narrow (N, C) · weight → (N, W) like wide
    out = torch.empty(narrow.shape[0], wide, dtype=narrow.dtype, device=narrow.device)
    descriptors, tiles = descriptors_and_programs(narrow, weight, *kept, out, turned=turned)
    kernel[(tiles["PROGRAMS"],)](*descriptors, *out.shape, narrow.shape[1], **tiles, num_warps=8, num_stages=3)
    return out


@torch.library.custom_op("nanochat_hf::squared_relu_up", mutates_args=())
def squared_relu_up(x: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """relu(x·upᵀ)² of x (N, C) and up (W, C) → (N, W), in their dtype; the product itself is float32 until it is squared."""
    return _launch(_squared_relu, x.contiguous(), up.shape[0], up.contiguous(), True)


@squared_relu_up.register_fake
def _(x, up):
    return x.new_empty(x.shape[0], up.shape[0])


@torch.library.custom_op("nanochat_hf::squared_relu_down_backward", mutates_args=())
def squared_relu_down_backward(dy: torch.Tensor, down: torch.Tensor, squared: torch.Tensor) -> torch.Tensor:
    """(dy·down)·2·√squared of dy (N, C), down (C, W) and squared (N, W) → (N, W): the gradient before the squared ReLU."""
    dy, down, squared = dy.contiguous(), down.contiguous(), squared.contiguous()
    by_cudnn = slope(dy, down, squared)
    return _launch(_slope, dy, down.shape[1], down, False, squared) if by_cudnn is None else by_cudnn


@squared_relu_down_backward.register_fake
def _(dy, down, squared):
    return torch.empty_like(squared)
