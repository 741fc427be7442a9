"""Cross-entropy of soft-capped logits and its gradient, in one kernel that reads and writes the logits once.

Letters: n tokens of a chunk, V vocabulary. The cap bounds the logits, so the sum of exponentials needs no maximum first.
"""

import torch
import triton
import triton.language as tl

COLUMNS = 4096  # logits that a program holds at a time


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _kernel(logits_ptr, target_ptr, weight_ptr, loss_ptr, stride, cap, vocab: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target, weight = tl.load(target_ptr + row), tl.load(weight_ptr + row)
    line = logits_ptr + row * stride
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, vocab, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        z = tl.load(line + column, column < vocab, float("-inf")).to(tl.float32)
        total += tl.where(column < vocab, tl.exp(cap * _tanh(z / cap) - cap), 0.0)
    normaliser = cap + tl.log(tl.sum(total, 0))
    at_target = cap * _tanh(tl.load(line + tl.maximum(target, 0)).to(tl.float32) / cap)
    weight = tl.where(target >= 0, weight, 0.0)
    tl.store(loss_ptr + row, (normaliser - at_target) * weight)
    for start in range(0, vocab, COLUMNS):  # the row still lies in the cache
        column = start + tl.arange(0, COLUMNS)
        squashed = _tanh(tl.load(line + column, column < vocab, 0.0).to(tl.float32) / cap)
        slope = tl.exp(cap * squashed - normaliser) - tl.where(column == target, 1.0, 0.0)
        slope = slope * (weight * (1.0 - squashed * squashed))
        tl.store(line + column, slope.to(logits_ptr.dtype.element_ty), column < vocab)


@torch.library.custom_op("nanochat_hf::softcapped_nll_", mutates_args=("logits",))
def softcapped_nll_(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, cap: float) -> torch.Tensor:
    """Uncapped logits (n, V), targets (n) with −100 ignored, weights (n) float32 → weight·nll (n) float32.

    The logits become the gradient of Σ weight·nll with respect to them.
    """
    loss = torch.empty_like(weight)
    _kernel[(logits.shape[0],)](logits, target, weight, loss, logits.stride(0), cap, vocab=logits.shape[1], COLUMNS=COLUMNS, num_warps=8)
    return loss


@softcapped_nll_.register_fake
def _(logits, target, weight, cap):
    return torch.empty_like(weight)
