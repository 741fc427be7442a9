"""Queries, keys and values by one product, then cuDNN's attention; both write their gradients into one tensor."""

import torch
from torch import Tensor

from nanochat_hf.model.configuration_nanochat_hf import NanochatConfig
from nanochat_hf.model.ops_nanochat_hf import Attend, Heads, Ops, ValueEmbedding, are_plain

from ..lib import cudnn_attention
from ..lib.devices import FLOAT8, hopper_takes, lacks_hopper
from ..lib.hopper import COLUMNS
from ..lib.projections import adds, backward_product, forward_product, head_counts, parts
from ..lib.rotation import lacks_formula, write_gradient
from ..lib.value_rows import gradients, order_of_ids
from ..lib.weights import computing, joint_sum, weight_of, weights_of

OP = "attention"
SUMMED = (("q_proj", "k_proj", "v_proj"), ("value_embeds",))


def fits(config: NanochatConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """None on Hopper in half precision where attention is cuDNN's, for the formula of the product."""
    if dtype == FLOAT8:
        return "projections are float8"
    if config._attn_implementation != cudnn_attention.NAME:
        return f"attention is {config._attn_implementation}, not {cudnn_attention.NAME}"
    if config.head_dim > COLUMNS // 2:
        return f"head_dim={config.head_dim} is above {COLUMNS // 2}"
    missing = cudnn_attention.missing(device)
    return lacks_formula(config) or lacks_hopper(device, dtype) or (missing and missing[0])


def serves(ops: Ops, x: Tensor, heads: Heads, value: ValueEmbedding | None, rope: Tensor, attend: Attend) -> bool:
    """For whole rows of several positions and layers that no library has replaced, where attention is still cuDNN's."""
    layers = heads[:3]
    return (
        attend.whole_rows
        and attend.implementation == cudnn_attention.NAME
        and x.shape[1] > 1
        and are_plain(*layers)
        and hopper_takes(x, *(size for layer in layers for size in weight_of(layer).shape))
    )


def run(
    ops: Ops, x: Tensor, heads: Heads, value: ValueEmbedding | None, rope: Tensor, attend: Attend
) -> tuple[Tensor, None]:
    """The output of the heads (B, T, H, D), and None for the attention weights."""
    weights, counts = weights_of(heads[:3], computing(x)), head_counts(heads)
    added = None
    lookup: list[Tensor | None] = [None] * 7
    if value is not None:
        gate, table, ids = value
        (rows,) = weights_of((table,), gate.dtype) if are_plain(table) else (None,)
        # the product adds the rows if they are in half precision; in float32 they would not fit beside its tiles
        if rows is not None and rows.dtype == gate.dtype and adds(sum(counts), heads.head_dim):
            lookup = [gate, rows, ids, *order_of_ids(ids, rows.shape[0]), joint_sum(table)]
        else:
            added = ops.gated_rows(*value)
    options = *counts, attend.scaling, attend.window or 0
    total = joint_sum(heads.q_proj)
    return ProductAndAttention.apply(x, *weights, added, rope, attend.borders, *options, total, *lookup), None


@torch.library.custom_op("nanochat_hf::rotated_attention_backward", mutates_args=())
def rotated_attention_backward(
    do: torch.Tensor,
    qkv: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    borders: torch.Tensor | None,
    scale: torch.Tensor,
    rope: torch.Tensor,
    scaling: float,
    window: int,
) -> torch.Tensor:
    """Gradient (B, T, W) of the product of `rotated_projections`, from that of cuDNN's attention with values v.

    Each kernel writes to its part of one tensor, so nothing is copied or summed.
    """
    q, k, _ = parts(qkv, out.shape[2], v.shape[2])
    gradient = torch.empty_like(qkv)
    dq, dk, dv = parts(gradient, out.shape[2], v.shape[2])
    cudnn_attention.write_gradients((dq, dk, dv), do, q, k, v, out, stats, borders, scaling, window)
    write_gradient(gradient, dq, dk, None, q, k, scale, rope)
    return gradient


@rotated_attention_backward.register_fake
def _(do, qkv, v, out, stats, borders, scale, rope, scaling, window):
    return qkv.new_empty(qkv.shape)


class ProductAndAttention(torch.autograd.Function):
    """As ops/one_product.py, then cuDNN's attention → (B, T, H, D).

    `added` (B, T, K, D), where given, is added to v. Or the product itself adds gate·table[ids]; it then gets gate,
    table, ids, the result of `order_of_ids`, and the sum of the table's gradients.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        added: Tensor | None,
        rope: Tensor,
        borders: Tensor | None,
        heads: int,
        key_heads: int,
        scaling: float,
        window: int,
        total: Tensor | None,
        gate: Tensor | None = None,
        table: Tensor | None = None,
        ids: Tensor | None = None,
        order: Tensor | None = None,
        sorted_ids: Tensor | None = None,
        starts: Tensor | None = None,
        table_total: Tensor | None = None,
    ) -> Tensor:
        """The output of the heads (B, T, H, D)."""
        lookup = () if gate is None or table is None or ids is None else (gate, table, ids)
        x, w, qkv, scale = forward_product(ctx, x, (q, k, v), rope, (heads, key_heads), *lookup)
        queries, keys, values = parts(qkv, heads, key_heads)
        values = values if added is None else values + added.to(values.dtype)
        out, stats = cudnn_attention.attention(queries, keys, values, borders, scaling, window)
        rows = gate, table, order, sorted_ids, starts, table_total
        ctx.save_for_backward(x, w, qkv, values, out, stats, borders, scale, rope, total, *rows)
        ctx.options, ctx.added = (scaling, window), None if added is None else added.dtype
        return out

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, the weights, `added`, gate and table."""
        x, w, qkv, values, out, stats, borders, scale, rope, total, *rows = ctx.saved_tensors
        gradient = rotated_attention_backward(do, qkv, values, out, stats, borders, scale, rope, *ctx.options)
        d_values = parts(gradient, ctx.heads, values.shape[2])[2]
        d_added = None if ctx.added is None else d_values.to(ctx.added)
        d_gate, d_table = (None, None) if rows[0] is None else gradients(d_values, *rows)
        return *backward_product(ctx, gradient, x, w, total), d_added, *[None] * 7, d_gate, d_table, *[None] * 5
