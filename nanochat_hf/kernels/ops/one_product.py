"""Queries, keys and values by one product on Hopper, rotated and normed while they are in registers."""

import torch
from torch import Tensor

from nanochat_hf.model.configuration_nanochat_hf import NanochatConfig
from nanochat_hf.model.ops_nanochat_hf import Heads, are_plain

from ..lib.devices import hopper_takes, lacks_hopper
from ..lib.hopper import COLUMNS
from ..lib.projections import backward_product, forward_product, head_counts, parts, rotated_backward
from ..lib.rotation import lacks_formula
from ..lib.weights import computing, joint_sum, weight_of, weights_of

OP = "queries_keys_values"
RANK = 1
SUMMED = (("q_proj", "k_proj", "v_proj"),)


def fits(config: NanochatConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """None on Hopper in half precision, for the kernel's formula and heads not wider than half a tile."""
    wide = f"head_dim={config.head_dim} is above {COLUMNS // 2}" if config.head_dim > COLUMNS // 2 else None
    return lacks_formula(config) or wide or lacks_hopper(device, dtype)


def serves(x: Tensor, heads: Heads, rope: Tensor) -> bool:
    """Only for layers that no library has replaced, with rows that TMA can read."""
    layers = heads[:3]
    return are_plain(*layers) and hopper_takes(x, *(size for layer in layers for size in weight_of(layer).shape))


def run(x: Tensor, heads: Heads, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, T, H, D), k and v (B, T, K, D), views of one tensor."""
    weights = weights_of(heads[:3], computing(x))
    return QueriesKeysValues.apply(x, *weights, rope, *head_counts(heads), joint_sum(heads.q_proj))


class QueriesKeysValues(torch.autograd.Function):
    """x (B, T, C), weights of q, k and v (or all three in q, and None), angles → q (B, T, H, D), k and v (B, T, K, D).

    The weights' gradients are added to their joint sum (W, C), where that is given.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        rope: Tensor,
        heads: int,
        key_heads: int,
        total: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, which are views of one tensor."""
        x, w, qkv, scale = forward_product(ctx, x, (q, k, v), rope, (heads, key_heads))
        ctx.save_for_backward(x, w, qkv, scale, rope, total)
        return parts(qkv, heads, key_heads)

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the weights."""
        x, w, qkv, scale, rope, total = ctx.saved_tensors
        gradient = rotated_backward(dq, dk, dv, qkv, scale, rope, ctx.heads)
        return *backward_product(ctx, gradient, x, w, total), *[None] * 4
