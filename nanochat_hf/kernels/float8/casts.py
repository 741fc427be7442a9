"""Casts to float8 that write a matrix and its transpose in one pass over memory.

For GPUs that have float8: Ada, Hopper and later. Letters: n rows, c columns.
"""

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 128, 64  # a tile: rows of 64 to 128 bytes both ways
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
            # kept lies transposed: n columns
            kept = tl.load(kept_ptr + far_column[:, None] * n + row[None, :], turned, 0.0).T.to(tl.float32)
            x *= 2.0 * tl.sqrt(kept * tl.load(kept_unit_ptr))
        x *= 1.0 / tl.load(unit_ptr)
        x = tl.where(x > HIGHEST, HIGHEST, x)
        x = tl.where(x < -HIGHEST, -HIGHEST, x)
        x = x.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + far_row[:, None] * out_row + column[None, :], x, inside)
    tl.store(transposed_ptr + far_column[:, None] * transposed_row + row[None, :], x.T, turned)


def launch(mode, x, out, transposed, unit=None, kept=None, kept_unit=None):
    """Write x (n, c), in units of the 0-d `unit`, to out (n, c) and transposed (c, n), which may be parts of wider tensors.

    SQUARE writes relu(x)². SLOPE writes x·2·√(kept·kept_unit), kept (c, n). TRANSPOSE moves a float8 x as it is; out is unused.
    """
    n, c = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    highest = torch.finfo(transposed.dtype).max
    if mode == TRANSPOSE:  # bytes move as bytes
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
    if mode != TRANSPOSE and x.element_size() == 4:
        # Triton 3.6 on an H100 wrote three in eight rows of the transpose of a float32 x wrongly; it turns bytes correctly
        launch(TRANSPOSE, out, None, transposed)
