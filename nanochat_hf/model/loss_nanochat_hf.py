"""Cross-entropy of soft-capped logits that takes its gradient chunk by chunk, while a chunk's logits exist.

Letters: N tokens, n of a chunk, C hidden_size, V vocabulary.
"""

import torch
import torch.nn.functional as F


def nll_and_slope(logits, target, weight, cap):
    """Uncapped logits (n, V), targets (n) with −100 ignored, weights (n) → weight·nll (n) float32, its gradient (n, V)."""
    weight, target = torch.where(target == -100, 0.0, weight).unsqueeze(1), target.clamp(min=0).unsqueeze(1)  # (n, 1)
    squashed = torch.tanh(logits.float() / cap)
    lse = torch.logsumexp(cap * squashed, dim=1, keepdim=True)
    nll = (lse - cap * squashed.gather(1, target)) * weight
    wrong = torch.exp(cap * squashed - lse) - (torch.arange(logits.shape[1], device=target.device) == target).float()
    return nll.squeeze(1), (wrong * weight * (1 - squashed.square())).to(logits.dtype)


def add_product(total, a, b):
    """total (n, m) float32 += a (n, k) · b (k, m)."""
    total += (a @ b).float()


class SoftcappedLoss(torch.autograd.Function):
    """Σ weight·nll of soft-capped logits, whose gradient is taken in the forward pass, chunk by chunk.

    The logits of a chunk are read while they exist and never made again: no (N, V) tensor, and no second product with the head.
    hidden (N, C), head (rows, C), targets (N) with −100 ignored, weights (N) float32 → 0-d float32.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, weights, vocab_size, cap, chunk, nll_and_slope, add_product):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            table = head[:vocab_size].to(dtype)
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            grad_head = torch.zeros(table.shape, dtype=torch.float32, device=hidden.device)
            grads = []
            for h, target, weight in zip(hidden.to(dtype).split(chunk), targets.split(chunk), weights.split(chunk), strict=True):
                nll, slope = nll_and_slope(h @ table.mT, target, weight, cap)
                total = total + nll.sum()
                grads.append((slope @ table).to(hidden.dtype))
                add_product(grad_head, slope.mT, h)
        ctx.save_for_backward(torch.cat(grads), grad_head)
        ctx.head = head.shape[0] - vocab_size, head.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, grad_head = ctx.saved_tensors
        padding, dtype = ctx.head
        grad_head = F.pad((grad_head * grad_output).to(dtype), (0, 0, 0, padding))
        return (grad_hidden * grad_output).to(grad_hidden.dtype), grad_head, None, None, None, None, None, None, None
