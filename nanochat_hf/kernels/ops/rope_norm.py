"""Queries and keys by one product, then RoPE and QK norm in one pass over memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_hf.model.configuration_nanochat_hf import NanochatConfig
from nanochat_hf.model.ops_nanochat_hf import Heads, are_plain

from ..lib.devices import lacks_triton
from ..lib.rotation import RopeNorm, lacks_formula
from ..lib.weights import weight_of

OP = "queries_keys_values"


def fits(config: NanochatConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """None on a GPU with Triton, for the kernel's formula."""
    return lacks_formula(config) or lacks_triton(device)


def serves(x: Tensor, heads: Heads, rope: Tensor) -> bool:
    """Only for layers that no library has replaced."""
    return are_plain(heads.q_proj, heads.k_proj)


def run(x: Tensor, heads: Heads, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, T, H, D), k and v (B, T, K, D)."""
    weights = weight_of(heads.q_proj), weight_of(heads.k_proj)
    both = F.linear(x, torch.cat(weights))
    sizes = (weight.shape[0] // heads.head_dim for weight in weights)
    return *RopeNorm.apply(both, rope, *sizes), heads.v_proj(x).unflatten(-1, (-1, heads.head_dim))
