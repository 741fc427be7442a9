"""Launch sizes of kernels that compute one row of C channels at a time."""

import torch
from torch import Tensor

from .devices import multiprocessors

PROGRAMS = 8  # on each multiprocessor: each sums its share of the rows, and loads the next row while it computes one


def warps(block: int) -> int:
    """Warps of a program that holds a row of `block` channels."""
    return min(max(block // 512, 1), 16)


def programs(x: Tensor, rows: int) -> int:
    """Number of programs among which `rows` rows of x are divided."""
    return min(PROGRAMS * multiprocessors(x.device) if x.is_cuda else 1, rows)


def epsilon(eps: float | None) -> float:
    """The epsilon that F.rms_norm uses for None: that of float32, in which it computes."""
    return torch.finfo(torch.float32).eps if eps is None else eps
