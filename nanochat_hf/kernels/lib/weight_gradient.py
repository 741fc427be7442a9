"""Gradients of weights by split-K: tiles of the result are cut along the tokens into pieces, whose products are summed.

Without that many multiprocessors would be idle in the last round (docs/records/2026-11-26-pieces-by-tma). For Hopper.
Letters: N tokens (the inner axis), G rows and K columns of the result.
"""

import functools
from collections.abc import Sequence
from itertools import chain, pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .devices import hopper_takes, multiprocessors
from .hopper import COLUMNS, DEPTH, ROWS, halves

Piece = tuple[int, int, int]  # tile, first step, end

CUTS = 4  # most pieces of a tile
OVERHEAD = 15  # cost of adding a piece to the sum, in steps, at most
# most steps, relative to a perfect division of the work; above it cuBLAS computes, which takes 1.05 to 1.35
EXCESS = 1.09
SUM_ROWS, SUM_COLUMNS = 32, 64  # the part of a tile that one program sums


@triton.jit
def _pieces(
    g_desc,
    x_desc,
    out_desc,
    table_ptr,
    pieces,
    APART: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    for piece in tl.range(tl.program_id(0), pieces, PROGRAMS, flatten=True):
        entry = table_ptr + piece * 4
        row, column, begin, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(begin, end, DEPTH):
            product = tl.dot(g_desc.load([start, row]).T, x_desc.load([start, column]), product)
        left, right = halves(product, ROWS, COLUMNS)
        if APART:  # _sum adds the pieces up
            out_desc.store([piece * ROWS, 0], left)
            out_desc.store([piece * ROWS, COLUMNS // 2], right)
        else:
            out_desc.atomic_add([row, column], left)
            out_desc.atomic_add([row, column + COLUMNS // 2], right)


@triton.jit
def _sum(
    pieces_ptr,
    corner_ptr,
    first_ptr,
    list_ptr,
    out_ptr,
    G,
    K,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tile, part = tl.program_id(2), tl.program_id(1) * PART + tl.arange(0, PART)
    column, total = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH), tl.zeros((PART, WIDTH), tl.float32)
    for i in tl.range(tl.load(first_ptr + tile), tl.load(first_ptr + tile + 1)):
        piece = tl.load(list_ptr + i).to(tl.int64)
        total += tl.load(pieces_ptr + (piece * ROWS + part)[:, None] * COLUMNS + column[None, :])
    row, column = tl.load(corner_ptr + 2 * tile) + part, tl.load(corner_ptr + 2 * tile + 1) + column
    out, inside = out_ptr + row.to(tl.int64)[:, None] * K + column[None, :], (row < G)[:, None] & (column < K)[None, :]
    tl.store(out, tl.load(out, inside, 0.0) + total, inside)


def cut(tiles: int, steps: int, programs: int, cuts: int) -> tuple[Piece, ...]:
    """((tile, first step, end), …): `tiles` of `steps` each, for `programs` that compute one piece after another.

    Each tile is cut into `cuts` pieces. Pieces with the same steps are neighbours, since they read the same rows. If
    the last round would leave programs idle, its pieces are cut again.
    """
    bounds = [steps * i // cuts for i in range(cuts + 1)]
    pieces = [(tile, *pair) for pair in pairwise(bounds) for tile in range(tiles)]
    whole = len(pieces) // programs * programs
    rest, pieces = pieces[whole:], pieces[:whole]
    again = programs // len(rest) if rest else 1
    finer = [
        (tile, a + (b - a) * i // again, a + (b - a) * (i + 1) // again) for i in range(again) for tile, a, b in rest
    ]
    return *pieces, *(piece for piece in finer if piece[1] < piece[2])


def length(pieces: Sequence[Piece], programs: int) -> int:
    """Steps until the last program is done, with OVERHEAD for each round."""
    rounds = [pieces[i : i + programs] for i in range(0, len(pieces), programs)]
    return sum(max(end - begin for _, begin, end in each) + OVERHEAD for each in rounds)


@functools.cache
def plan(N: int, G: int, K: int, programs: int) -> tuple[Piece, ...] | None:
    """Pieces of the product, or None where cuBLAS is likely to be as fast."""
    tiles, steps = -(-G // ROWS) * -(-K // COLUMNS), -(-N // DEPTH)
    best = min(
        (cut(tiles, steps, programs, cuts) for cuts in range(1, CUTS + 1)), key=lambda pieces: length(pieces, programs)
    )
    return best if length(best, programs) < EXCESS * tiles * steps / programs else None


def _corners(G, K):
    # (row, column) of the tiles, along the shorter side first, so that tiles computed together share rows and columns
    rows, columns = range(0, G, ROWS), range(0, K, COLUMNS)
    return (
        [(row, column) for row in rows for column in columns]
        if G >= K
        else [(row, column) for column in columns for row in rows]
    )


@functools.cache
def _tables(pieces, G, K, device):
    # Four tables. Pieces: row, column, first token, end. Tiles: row and column; where each tile's list of pieces
    # begins; the lists one after another.
    corners = _corners(G, K)
    entries = [(*corners[tile], begin * DEPTH, end * DEPTH) for tile, begin, end in pieces]
    lists: list[list[int]] = [[] for _ in corners]
    for number, (tile, *_) in enumerate(pieces):
        lists[tile].append(number)
    first = torch.tensor([0, *map(len, lists)]).cumsum(0)
    return [
        torch.tensor(table, dtype=torch.int32).to(device)
        for table in (entries, corners, first.tolist(), list(chain(*lists)))
    ]


def by_pieces(g: Tensor, x: Tensor, total: Tensor, pieces: tuple[Piece, ...], programs: int) -> None:
    """Add gᵀ·x of g (N, G) and x (N, K) to total (G, K) float32, all contiguous; `programs` compute `pieces`.

    TMA adds a piece to the sum when it is done, in any order. Where torch.use_deterministic_algorithms asks for one
    order, or without TMA, each piece is stored first and a second kernel sums them.
    """
    (_, G), K, apart = g.shape, x.shape[1], not g.is_cuda or torch.are_deterministic_algorithms_enabled()
    table, *tiles = _tables(pieces, G, K, g.device)
    out = torch.empty(len(table) * ROWS, COLUMNS, dtype=torch.float32, device=g.device) if apart else total
    descriptors = [TensorDescriptor.from_tensor(g, [DEPTH, ROWS]), TensorDescriptor.from_tensor(x, [DEPTH, COLUMNS])]
    descriptors.append(TensorDescriptor.from_tensor(out, [ROWS, COLUMNS // 2]))
    _pieces[(programs,)](
        *descriptors,
        table,
        len(table),
        APART=apart,
        PROGRAMS=programs,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        num_warps=8,
        num_stages=3,
    )
    if apart:
        grid, sizes = (
            (COLUMNS // SUM_COLUMNS, ROWS // SUM_ROWS, len(tiles[0])),
            dict(ROWS=ROWS, COLUMNS=COLUMNS, PART=SUM_ROWS, WIDTH=SUM_COLUMNS),
        )
        _sum[grid](out, *tiles, total, G, K, **sizes, num_warps=4)


def _pieces_of(g, K):
    programs = multiprocessors(g.device)
    return plan(len(g), g.shape[1], K, programs) if hopper_takes(g, g.shape[1], K) else None, programs


def add_by_pieces(total: Tensor, g: Tensor, x: Tensor) -> bool:
    """Whether pieces are faster than cuBLAS; if so, total (G, K) += gᵀ·x of g (N, G) and x (N, K)."""
    pieces, programs = _pieces_of(g, x.shape[1])
    if pieces is not None:
        by_pieces(g.contiguous(), x.contiguous(), total, pieces, programs)
    return pieces is not None


@torch.library.custom_op("nanochat_hf::weight_gradient", mutates_args=())
def weight_gradient(g: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gᵀ·x of g (N, G) and x (N, K) → (G, K) of `dtype`; cuBLAS computes it where that is as fast."""
    pieces, programs = _pieces_of(g, x.shape[1])
    if pieces is None:
        return (g.mT @ x).to(dtype)
    total = torch.zeros(g.shape[1], x.shape[1], dtype=torch.float32, device=g.device)
    by_pieces(g.contiguous(), x.contiguous(), total, pieces, programs)
    return total.to(dtype)


@weight_gradient.register_fake
def _(g, x, dtype):
    return g.new_empty(g.shape[1], x.shape[1], dtype=dtype)
