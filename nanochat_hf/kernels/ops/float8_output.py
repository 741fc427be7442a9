"""The output projection by a float8 product."""

import torch
from torch import Tensor, nn

from nanochat_hf.model.configuration_nanochat_hf import NanochatConfig
from nanochat_hf.model.ops_nanochat_hf import are_plain

from .. import float8
from ..float8 import layers

OP = "project_and_add"
RANK = 2
TOLERANCE = (0.042, 0.065)  # error of rounding to float8, forward and backward: see tests/kernels/test_float8.py


def fits(config: NanochatConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where float8 is asked for and 16 divides the sides of the matrices."""
    return float8.lacks(device, dtype, config.hidden_size, config.num_attention_heads * config.head_dim)


def serves(y: Tensor, o_proj: nn.Module, stream: Tensor) -> bool:
    """Only for layers that no library has replaced, and for a number of tokens that 16 divides."""
    return are_plain(o_proj) and float8.takes(y)


def run(y: Tensor, o_proj: nn.Module, stream: Tensor) -> Tensor:
    """stream (B, T, C) + o_proj(y)."""
    return stream + layers.Linear.apply(y, o_proj.weight)
