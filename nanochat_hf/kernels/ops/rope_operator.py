"""Rope tables as an operator, so that torch.compile computes them once and not again in each layer."""

import torch
from torch import Tensor

from nanochat_hf.model.configuration_nanochat_hf import NanochatConfig
from nanochat_hf.model.ops_nanochat_hf import rope_tables

OP = "rope_tables"


def fits(config: NanochatConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """None: it runs anywhere. Used in training only, because exporters such as torch.onnx do not know our operators."""
    return None


def run(position_ids: Tensor, head_dim: int, theta: float, rounded: bool) -> Tensor:
    """(2, B, T, 1, D/2)."""
    return torch.ops.nanochat_hf.rope(position_ids, head_dim, theta, rounded)


@torch.library.custom_op("nanochat_hf::rope", mutates_args=())
def _rope(position_ids: Tensor, head_dim: int, theta: float, rounded: bool) -> Tensor:
    return rope_tables(position_ids, head_dim, theta, rounded)


@_rope.register_fake
def _(position_ids, head_dim, theta, rounded):
    dtype = torch.bfloat16 if rounded else torch.float32
    return position_ids.new_empty((2, *position_ids.shape, 1, head_dim // 2), dtype=dtype)
