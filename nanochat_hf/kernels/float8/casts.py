"""Casts to float8 that write a matrix and its transpose in one pass over memory.

For GPUs with float8: Ada, Hopper and later. Letters: n rows, c columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 128, 64  # a tile, which is written in rows of 64 bytes and in transposed rows of 128
CAST, SQUARE, SLOPE, TRANSPOSE = range(4)


@triton.jit
def _cast(
    x_ptr,
    kept_ptr,
    kept_unit_ptr,
    unit_ptr,
    out_ptr,
    transposed_ptr,
    n,
    c,
    x_row,
    out_row,
    transposed_row,
    HIGHEST: tl.constexpr,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n)[:, None] & (column < c)[None, :]
    turned = (column < c)[:, None] & (row < n)[None, :]
    far_row, far_column = row.to(tl.int64), column.to(tl.int64)  # a wide activation may have 2³¹ elements
    x = tl.load(x_ptr + far_row[:, None] * x_row + column[None, :], inside, 0.0)
    if MODE != 3:
        x = x.to(tl.float32)
        if MODE == 1:
            x = tl.where(x > 0.0, x * x, x * 0.0)  # NaN stays NaN
        if MODE == 2:
            # kept is transposed: rows of n elements
            kept = tl.load(kept_ptr + far_column[:, None] * n + row[None, :], turned, 0.0).T.to(tl.float32)
            x *= 2.0 * tl.sqrt(kept * tl.load(kept_unit_ptr))
        x *= 1.0 / tl.load(unit_ptr)
        x = tl.where(x > HIGHEST, HIGHEST, x)
        x = tl.where(x < -HIGHEST, -HIGHEST, x)
        x = x.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + far_row[:, None] * out_row + column[None, :], x, inside)
    tl.store(transposed_ptr + far_column[:, None] * transposed_row + row[None, :], x.T, turned)


def launch(
    mode: int,
    x: Tensor,
    out: Tensor | None,
    transposed: Tensor,
    unit: Tensor | None = None,
    kept: Tensor | None = None,
    kept_unit: Tensor | None = None,
) -> None:
    """Write x / unit (n, c) to `out` and its transpose (c, n) to `transposed`; both may be parts of wider tensors.

    SQUARE writes relu(x)². SLOPE writes x·2·√(kept·kept_unit), kept (c, n). TRANSPOSE only transposes a float8 x; out
    is None.
    """
    n, c = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    highest = torch.finfo(transposed.dtype).max
    if mode == TRANSPOSE:  # no arithmetic, so any type of one byte will do
        x, transposed = x.view(torch.uint8), transposed.view(torch.uint8)
    grid = (triton.cdiv(n, ROWS), triton.cdiv(c, COLUMNS))
    _cast[grid](
        x,
        kept,
        kept_unit,
        unit,
        out,
        transposed,
        n,
        c,
        x.stride(0),
        0 if out is None else out.stride(0),
        transposed.stride(0),
        HIGHEST=highest,
        MODE=mode,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=8,
    )
    if out is not None and mode != TRANSPOSE and x.element_size() == 4:
        # Triton 3.6 on an H100 writes three of eight rows of the transpose wrongly where x is float32. Bytes it
        # transposes correctly, so the float8 result is transposed in a second launch.
        launch(TRANSPOSE, out, None, transposed)
