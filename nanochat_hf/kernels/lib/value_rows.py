"""Gradients of gated rows of a table, summed over the tokens of each id.

Each row of the table is read and written once; atomic sums would access it once for each token. The result is
deterministic. Letters: N tokens, V rows of the table, K heads, D elements of each, C = K·D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 128  # tokens of a program


@triton.jit
def _tokens(
    d_ptr,
    table_ptr,
    gate_ptr,
    order_ptr,
    id_ptr,
    start_ptr,
    d_gate_ptr,
    row_ptr,
    part_ptr,
    N,
    C,
    d_row,
    d_token,
    positions,
    ADD: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    begin = tl.program_id(0) * CHUNK
    column, head = tl.arange(0, HEADS * D), tl.arange(0, HEADS)
    keep, width, heads = column < C, tl.full((1,), C, tl.int64), C // D
    total = tl.zeros((HEADS * D,), tl.float32)
    for i in tl.range(begin, min(begin + CHUNK, N), num_stages=2):
        token, row = tl.load(order_ptr + i), tl.load(id_ptr + i)
        source = d_ptr + (token // positions).to(tl.int64) * d_row + (token % positions).to(tl.int64) * d_token
        d = tl.load(source + column, keep, 0.0).to(tl.float32)
        value = tl.load(table_ptr + row * width + column, keep, 0.0).to(tl.float32)
        if ADD:
            before = tl.load(row_ptr + row * width + column, keep, 0.0)
        along = tl.sum((d * value).reshape(HEADS, D), 1)
        tl.store(d_gate_ptr + token * heads + head, along, head < heads)
        total += d * tl.load(gate_ptr + token * heads + column // D, keep, 0.0).to(tl.float32)
        first, end = tl.load(start_ptr + row), tl.load(start_ptr + row + 1)
        if (i + 1 == end) | (i + 1 == begin + CHUNK):  # the last token of this id, or of this program
            if (first >= begin) & (end <= begin + CHUNK):
                if ADD:
                    total += before
                tl.store(row_ptr + row * width + column, total, keep)
            else:  # several programs have tokens of this id; slot 0 is for the chunk's first id, slot 1 for its last
                slot = 2 * tl.program_id(0) + (first > begin).to(tl.int32)
                tl.store(part_ptr + slot * width + column, total, keep)
            total = tl.zeros((HEADS * D,), tl.float32)


@triton.jit
def _rows(start_ptr, row_ptr, part_ptr, C, ADD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    width, keep = tl.full((1,), C, tl.int64), column < C
    first, end = tl.load(start_ptr + row), tl.load(start_ptr + row + 1)
    begin, after = first // CHUNK, tl.cdiv(end, CHUNK)
    several = after - begin > 1
    wanted = several & (end > first) if ADD else several | (end == first)
    if wanted:  # several programs had tokens of this id, or none did
        total = tl.load(row_ptr + row * width + column, keep, 0.0) if ADD else tl.zeros((BLOCK,), tl.float32)
        if end > first:
            for chunk in tl.range(begin, after):
                slot = 2 * chunk + (first > chunk * CHUNK).to(tl.int32)
                total += tl.load(part_ptr + slot * width + column, keep, 0.0)
        tl.store(row_ptr + row * width + column, total, keep)


@torch.library.custom_op("nanochat_hf::order_of_ids", mutates_args=())
def order_of_ids(ids: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids (…) below `rows` → the order that sorts them (N), sorted ids (N), where each id begins (rows + 1); int32."""
    ids, order = ids.flatten().int().sort(stable=True)
    starts = torch.searchsorted(ids, torch.arange(rows + 1, dtype=torch.int32, device=ids.device), out_int32=True)
    return order.int(), ids, starts


@order_of_ids.register_fake
def _(ids, rows):
    new = [ids.new_empty(count, dtype=torch.int32) for count in (ids.numel(), ids.numel(), rows + 1)]
    return new[0], new[1], new[2]


def _backward(d, table, gate, order, ids, starts, d_table, add):
    # write d_table (V, C) or add to it, and return the gradient of the gate
    B, T, K, D = d.shape
    d = d if d.stride(3) == 1 and d.stride(2) == D else d.contiguous()
    table, gate, chunks = table.contiguous(), gate.contiguous(), triton.cdiv(B * T, CHUNK)
    d_gate = torch.empty(gate.shape, dtype=torch.float32, device=d.device)
    parts = torch.empty(2 * chunks, K * D, dtype=torch.float32, device=d.device)
    heads = triton.next_power_of_2(K)
    warps = min(max(heads * D // 512, 1), 16)
    _tokens[(chunks,)](
        d,
        table,
        gate,
        order,
        ids,
        starts,
        d_gate,
        d_table,
        parts,
        B * T,
        K * D,
        d.stride(0),
        d.stride(1),
        T,
        ADD=add,
        D=D,
        HEADS=heads,
        CHUNK=CHUNK,
        num_warps=warps,
    )
    _rows[(len(table),)](starts, d_table, parts, K * D, ADD=add, BLOCK=heads * D, CHUNK=CHUNK, num_warps=warps)
    return d_gate


@torch.library.custom_op("nanochat_hf::gated_rows_backward", mutates_args=())
def gated_rows_backward(
    d: torch.Tensor,
    table: torch.Tensor,
    gate: torch.Tensor,
    order: torch.Tensor,
    ids: torch.Tensor,
    starts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """d (B, T, K, D), table (V, C), gate (B, T, K) and the result of `order_of_ids` → gradients of both, float32."""
    d_table = torch.empty(table.shape, dtype=torch.float32, device=d.device)
    return d_table, _backward(d, table, gate, order, ids, starts, d_table, False)


@gated_rows_backward.register_fake
def _(d, table, gate, order, ids, starts):
    return table.new_empty(table.shape, dtype=torch.float32), gate.new_empty(gate.shape, dtype=torch.float32)


@torch.library.custom_op("nanochat_hf::add_gated_rows_backward", mutates_args=("total",))
def add_gated_rows_backward(
    total: torch.Tensor,
    d: torch.Tensor,
    table: torch.Tensor,
    gate: torch.Tensor,
    order: torch.Tensor,
    ids: torch.Tensor,
    starts: torch.Tensor,
) -> torch.Tensor:
    """As `gated_rows_backward`, with the gradient of the table added to total (V, C) float32."""
    return _backward(d, table, gate, order, ids, starts, total, True)


@add_gated_rows_backward.register_fake
def _(total, d, table, gate, order, ids, starts):
    return gate.new_empty(gate.shape, dtype=torch.float32)


def gradients(
    d: Tensor, gate: Tensor, table: Tensor, order: Tensor, ids: Tensor, starts: Tensor, total: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of gate and table from d (B, T, K, D), that of gate·table[ids]; None for a table with a `total`."""
    if total is not None:
        return add_gated_rows_backward(total, d, table, gate, order, ids, starts).to(gate.dtype), None
    d_table, d_gate = gated_rows_backward(d, table, gate, order, ids, starts)
    return d_gate.to(gate.dtype), d_table.to(table.dtype)
