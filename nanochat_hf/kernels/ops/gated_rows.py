"""Rows of the value embeddings times their gates; a table's gradient is summed for each id, without atomics."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_hf.model.configuration_nanochat_hf import NanochatConfig
from nanochat_hf.model.ops_nanochat_hf import are_plain

from ..lib.devices import lacks_triton
from ..lib.value_rows import gradients, order_of_ids
from ..lib.weights import joint_sum, weight_of, weights_of

OP = "gated_rows"
SUMMED = (("value_embeds",),)


def fits(config: NanochatConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """None on a GPU with Triton, for models with value embeddings."""
    return lacks_triton(device) if config.use_value_embeddings else "no value embeddings"


def serves(gate: Tensor, table: nn.Module, ids: Tensor) -> bool:
    """Only for tables that no library has replaced."""
    return are_plain(table)


def run(gate: Tensor, table: nn.Module, ids: Tensor) -> Tensor:
    """gate · table[ids] (B, T, K, D). Each layer sorts the ids; a compiled graph sorts them once for all layers."""
    (weight,) = weights_of((table,), gate.dtype)
    return GatedRows.apply(gate, weight, ids, *order_of_ids(ids, weight_of(table).shape[0]), joint_sum(table))


class GatedRows(torch.autograd.Function):
    """gate (B, T, K), table (V, K·D), ids (B, T) and their order → gate·table[ids] (B, T, K, D) of gate's dtype.

    The table's gradient is added to its sum, where that is given.
    """

    @staticmethod
    def forward(
        ctx,
        gate: Tensor,
        table: Tensor,
        ids: Tensor,
        order: Tensor,
        sorted_ids: Tensor,
        starts: Tensor,
        total: Tensor | None = None,
    ) -> Tensor:
        """The gated rows."""
        ctx.save_for_backward(gate, table, order, sorted_ids, starts, total)
        rows = F.embedding(ids, table).unflatten(-1, (gate.shape[-1], -1))
        return gate.unsqueeze(-1) * rows.to(gate.dtype)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of gate and table."""
        return *gradients(d, *ctx.saved_tensors), *[None] * 5
