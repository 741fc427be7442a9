"""Float8 products of the MLP that also apply the squared ReLU or its slope and cast the result. For Hopper.

The cast needs the unit of the result before the product is computed. So the unit comes from a bound, not from the
maximum. Letters: N tokens, C hidden_size, W = 4C intermediate_size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..lib.hopper import halves

ROWS, COLUMNS, DEPTH = 128, 256, 128  # a tile of the result, and the elements of the inner axis in a step


@triton.jit
def _finish(
    value,
    kept_desc,
    out_desc,
    turned_desc,
    factor,
    kept_unit,
    inverse,
    row,
    column,
    SLOPE: tl.constexpr,
    HIGHEST: tl.constexpr,
):
    value *= factor
    if SLOPE:
        kept = kept_desc.load([column, row]).T.to(tl.float32)
        value *= 2.0 * tl.sqrt(kept * kept_unit)
    else:
        value = tl.where(value > 0.0, value * value, value * 0.0)  # NaN stays NaN
    value *= inverse
    value = tl.where(value > HIGHEST, HIGHEST, value)
    value = tl.where(value < -HIGHEST, -HIGHEST, value).to(out_desc.dtype)
    out_desc.store([row, column], value)
    turned_desc.store([column, row], value.T)


@triton.jit
def _wide(
    a_desc,
    b_desc,
    kept_desc,
    out_desc,
    turned_desc,
    a_unit_ptr,
    b_unit_ptr,
    kept_unit_ptr,
    unit_ptr,
    N,
    W,
    C,
    SLOPE: tl.constexpr,
    HIGHEST: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    factor, inverse, kept_unit = (
        tl.load(a_unit_ptr) * tl.load(b_unit_ptr),
        1.0 / tl.load(unit_ptr),
        tl.load(kept_unit_ptr),
    )
    across = tl.cdiv(W, COLUMNS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, ROWS) * across, PROGRAMS, flatten=True):
        row, column = tile // across * ROWS, tile % across * COLUMNS
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, C, DEPTH):
            product = tl.dot(a_desc.load([row, start]), b_desc.load([column, start]).T, product)
        left, right = halves(product, ROWS, COLUMNS)
        _finish(left, kept_desc, out_desc, turned_desc, factor, kept_unit, inverse, row, column, SLOPE, HIGHEST)
        _finish(
            right,
            kept_desc,
            out_desc,
            turned_desc,
            factor,
            kept_unit,
            inverse,
            row,
            column + COLUMNS // 2,
            SLOPE,
            HIGHEST,
        )


def suits(x: Tensor) -> bool:
    """Whether these kernels run on the device of `x`."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


def launch(
    a: Tensor,
    b: Tensor,
    units: tuple[Tensor, Tensor],
    unit: Tensor,
    dtype: torch.dtype,
    kept: Tensor | None = None,
    kept_unit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """a (N, C) · bᵀ of b (W, C), float8 in `units` → (N, W) and its transpose (W, N), float8 in `unit`.

    Without `kept` it is the squared ReLU of the product; with kept (W, N) the product times 2·√(keptᵀ·kept_unit).
    """
    (N, C), W = a.shape, b.shape[0]
    out, turned = a.new_empty(N, W, dtype=dtype), a.new_empty(W, N, dtype=dtype)
    half = [COLUMNS // 2, ROWS]  # the part of the result that fits into shared memory at one time
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 2
    _wide[(programs,)](
        TensorDescriptor.from_tensor(a, [ROWS, DEPTH]),
        TensorDescriptor.from_tensor(b, [COLUMNS, DEPTH]),
        TensorDescriptor.from_tensor(turned if kept is None else kept, half),
        TensorDescriptor.from_tensor(out, half[::-1]),
        TensorDescriptor.from_tensor(turned, half),
        *units,
        unit if kept is None else kept_unit,
        unit,
        N,
        W,
        C,
        SLOPE=kept is not None,
        HIGHEST=torch.finfo(dtype).max,
        PROGRAMS=programs,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        num_warps=8,
        num_stages=3,
    )
    return out, turned
