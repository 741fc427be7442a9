"""How kernels that take one row of C channels at a time are launched."""

import torch
from torch import Tensor

from .devices import multiprocessors

PROGRAMS = 8  # a multiprocessor: each sums its share of a result, and loads a row while it computes the last


def warps(block: int) -> int:
    """Warps of a program that holds a row of `block` channels."""
    return min(max(block // 512, 1), 16)


def programs(x: Tensor, rows: int) -> int:
    """Programs that share `rows` rows of x."""
    return min(PROGRAMS * multiprocessors(x.device) if x.is_cuda else 1, rows)


def epsilon(eps: float | None) -> float:
    """The epsilon that F.rms_norm takes for None: that of the dtype it computes in."""
    return torch.finfo(torch.float32).eps if eps is None else eps
