"""The MLP by float8 products, with the squared ReLU and the casts inside."""

import torch
from torch import Tensor, nn

from nanochat_hf.model.configuration_nanochat_hf import NanochatConfig
from nanochat_hf.model.ops_nanochat_hf import are_plain

from .. import float8
from ..float8 import layers

OP = "squared_relu_mlp"
RANK = 2
TOLERANCE = (0.07, 0.105)  # error of rounding to float8, forward and backward: see tests/kernels/test_float8.py


def fits(config: NanochatConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where float8 is asked for and 16 divides the sides of the matrices."""
    return float8.lacks(device, dtype, config.hidden_size, config.intermediate_size)


def serves(x: Tensor, up_proj: nn.Module, down_proj: nn.Module) -> bool:
    """Only for layers that no library has replaced, and for a number of tokens that 16 divides."""
    return are_plain(up_proj, down_proj) and float8.takes(x)


def run(x: Tensor, up_proj: nn.Module, down_proj: nn.Module) -> Tensor:
    """Normed x (B, T, C) → (B, T, C)."""
    return layers.SquaredReluMLP.apply(x, up_proj.weight, down_proj.weight)
