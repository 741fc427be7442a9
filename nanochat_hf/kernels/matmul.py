"""Products of the MLP with the squared ReLU, or its slope, taken while the result lies in registers. For Hopper, by TMA.

Letters: N tokens, C hidden_size, W = 4C intermediate_size.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

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


def _launch(kernel, narrow, wide, weight, weight_block, *kept):
    # narrow (N, C) · weight → (N, W) like wide; one program a multiprocessor, each of which walks over the tiles
    out = torch.empty(narrow.shape[0], wide, dtype=narrow.dtype, device=narrow.device)
    half = [ROWS, COLUMNS // 2]  # what a program holds of the result beside the accumulators
    descriptors = [TensorDescriptor.from_tensor(narrow, [ROWS, DEPTH]), TensorDescriptor.from_tensor(weight, weight_block)]
    descriptors += [TensorDescriptor.from_tensor(tensor, half) for tensor in (*kept, out)]
    programs = torch.cuda.get_device_properties(narrow.device).multi_processor_count if narrow.is_cuda else 2
    kernel[(programs,)](
        *descriptors, *out.shape, narrow.shape[1], PROGRAMS=programs, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH,
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


@torch.library.custom_op("nanochat_hf::squared_relu_up", mutates_args=())
def squared_relu_up(x: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """relu(x·upᵀ)² of x (N, C) and up (W, C) → (N, W), in their dtype; the product itself is float32 until it is squared."""
    return _launch(_squared_relu, x.contiguous(), up.shape[0], up.contiguous(), [COLUMNS, DEPTH])


@squared_relu_up.register_fake
def _(x, up):
    return x.new_empty(x.shape[0], up.shape[0])


@torch.library.custom_op("nanochat_hf::squared_relu_down_backward", mutates_args=())
def squared_relu_down_backward(dy: torch.Tensor, down: torch.Tensor, squared: torch.Tensor) -> torch.Tensor:
    """(dy·down)·2·√squared of dy (N, C), down (C, W) and squared (N, W) → (N, W): the gradient before the squared ReLU."""
    return _launch(_slope, dy.contiguous(), down.shape[1], down.contiguous(), [DEPTH, COLUMNS], squared.contiguous())


@squared_relu_down_backward.register_fake
def _(dy, down, squared):
    return torch.empty_like(squared)
