"""Tiles of products on Hopper, whose operands TMA loads: sizes, descriptors, and the halves in which they are stored.

Letters: N tokens, C inner width, W width of the result.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .devices import multiprocessors

ROWS, COLUMNS, DEPTH = 128, 256, 64  # a tile of the result, and the elements of the inner axis in a step


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile (ROWS, COLUMNS): a program has room for one beside its accumulators."""
    return tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


def descriptors_and_tiles(narrow: Tensor, weight: Tensor, *wide: Tensor, turned: bool = True) -> tuple[list, dict]:
    """Descriptors of narrow (N, C), weight and `wide` tensors (N, W), and the sizes of the tiles as keywords.

    The weight is (W, C) where `turned`, else (C, W). One program runs on each multiprocessor and computes tile after
    tile.
    """
    half = [ROWS, COLUMNS // 2]
    descriptors = [TensorDescriptor.from_tensor(narrow, [ROWS, DEPTH])]
    descriptors += [TensorDescriptor.from_tensor(weight, [COLUMNS, DEPTH] if turned else [DEPTH, COLUMNS])]
    descriptors += [TensorDescriptor.from_tensor(tensor, half) for tensor in wide]
    programs = multiprocessors(narrow.device)
    return descriptors, dict(PROGRAMS=programs, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH)
