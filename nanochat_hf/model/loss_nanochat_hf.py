"""Cross-entropy of soft-capped logits, computed with its gradient chunk by chunk, so that few logits exist at once.

Letters: N tokens, C hidden_size, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .ops_nanochat_hf import Ops


class LossSizes(NamedTuple):
    """Rows of the head that are tokens, the soft-cap, and how many tokens have logits at one time."""

    vocab_size: int
    cap: float
    chunk: int


class SoftcappedLoss(torch.autograd.Function):
    """Σ weight·nll of soft-capped logits, 0-d float32.

    hidden (N, C), head (V or more rows, C), targets (N) where −100 is ignored, weights (N) float32.

    The forward pass computes the gradient too, while the logits of a chunk exist. So no (N, V) tensor is kept, and the
    product with the head is computed once.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, sizes: LossSizes, ops: Ops
    ) -> Tensor:
        """The sum, 0-d float32; keeps both gradients for backward."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            table = head[: sizes.vocab_size].to(dtype)
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            grad_head = torch.zeros(table.shape, dtype=torch.float32, device=hidden.device)
            grads = []
            chunks = (tensor.split(sizes.chunk) for tensor in (hidden.to(dtype), targets, weights))
            for h, target, weight in zip(*chunks, strict=True):
                nll, slope = ops.nll_and_slope(h @ table.mT, target, weight, sizes.cap)
                total = total + nll.sum()
                grads.append((slope @ table).to(hidden.dtype))
                ops.add_product(grad_head, slope.mT, h)
        ctx.save_for_backward(torch.cat(grads), grad_head)
        ctx.padding, ctx.head_dtype = head.shape[0] - sizes.vocab_size, head.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradients of hidden (N, C) and head, times that of the sum."""
        grad_hidden, grad_head = ctx.saved_tensors
        grad_head = F.pad((grad_head * grad_output).to(ctx.head_dtype), (0, 0, 0, ctx.padding))
        return (grad_hidden * grad_output).to(grad_hidden.dtype), grad_head, None, None, None, None


def chunked_loss(
    logits: Callable, hidden: Tensor, targets: Tensor, weights: Tensor, chunk: int, recompute: bool
) -> Tensor:
    """The same sum for heads that are more than a weight, such as adapters. `logits`: hidden (n, C) → capped (n, V).

    `recompute`: backward computes each chunk of logits again, so that only one exists at a time.
    """

    def part_of(hidden, targets, weights):
        return (F.cross_entropy(logits(hidden), targets, ignore_index=-100, reduction="none") * weights).sum()

    total = hidden.new_zeros((), dtype=torch.float32)
    for part in zip(*(tensor.split(chunk) for tensor in (hidden, targets, weights)), strict=True):
        save = recompute and len(targets) > chunk
        total = total + (checkpoint(part_of, *part, use_reentrant=False) if save else part_of(*part))
    return total
