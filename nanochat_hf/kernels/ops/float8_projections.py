"""Queries, keys and values by one float8 product of normed x, then RoPE and QK norm."""

import torch
from torch import Tensor

from nanochat_hf.model.configuration_nanochat_hf import NanochatConfig
from nanochat_hf.model.ops_nanochat_hf import Heads, are_plain, norm, rotate

from .. import float8
from ..float8 import layers
from ..lib.weights import weight_of

OP = "queries_keys_values"
RANK = 2
TOLERANCE = (0.042, 0.08)  # error of rounding to float8, forward and backward: see tests/kernels/test_float8.py


def fits(config: NanochatConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where float8 is asked for and 16 divides the sides of the matrices."""
    heads = config.num_attention_heads, config.num_key_value_heads
    return float8.lacks(device, dtype, config.hidden_size, *(count * config.head_dim for count in heads))


def serves(x: Tensor, heads: Heads, rope: Tensor) -> bool:
    """Only for layers that no library has replaced, and for a number of tokens that 16 divides."""
    return are_plain(*heads[:3]) and float8.takes(x)


def run(x: Tensor, heads: Heads, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, T, H, D), k and v (B, T, K, D)."""
    both, v = layers.Projections.apply(x, *(layer.weight for layer in heads[:3]))
    counts = [weight_of(layer).shape[0] // heads.head_dim for layer in (heads.q_proj, heads.k_proj)]
    q, k = rotated(both, counts, heads, rope)
    return q, k, v.unflatten(-1, (-1, heads.head_dim))


def rotated(both: Tensor, counts: list[int], heads: Heads, rope: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, T, (H + K)·D), rotated and normed, by Triton's kernel where it has the formula."""
    known = heads.eps is None and rope.dtype == torch.bfloat16 and heads.head_dim & (heads.head_dim - 1) == 0
    if known and both.is_cuda:
        from ..lib.rotation import RopeNorm

        return RopeNorm.apply(both, rope, *counts)
    cos, sin = rope.to(both.dtype)
    q, k = both.unflatten(-1, (-1, heads.head_dim)).split(counts, dim=2)
    return norm(rotate(q, cos, sin), heads.eps), norm(rotate(k, cos, sin), heads.eps)
