"""Cross-entropy of soft-capped logits and its gradient, in one kernel that reads and writes the logits once.

Letters: n tokens of a chunk, V vocabulary. The cap bounds the logits, so the sum of exponentials needs no maximum first.
"""

import torch
import triton
import triton.language as tl

COLUMNS = 8192  # logits that a program holds at a time

@triton.jit
def _r(z, cap):
    # tanh(z/cap) = 1 − 2r: two of the three functions that soft-cap and exponential cost
    return 1.0 / (tl.exp(z.to(tl.float32) * (2.0 / cap)) + 1.0)


@triton.jit
def _kernel(logits_ptr, target_ptr, weight_ptr, loss_ptr, stride, cap, vocab: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target, weight = tl.load(target_ptr + row), tl.load(weight_ptr + row)
    weight = tl.where(target >= 0, weight, 0.0)
    line = logits_ptr + row * stride
    at_target = _r(tl.load(line + tl.maximum(target, 0)), cap)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, vocab, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        if vocab % COLUMNS == 0:
            total += tl.exp(_r(tl.load(line + column), cap) * (-2.0 * cap))  # exp(cap·tanh(z/cap) − cap)
        else:
            r = _r(tl.load(line + column, column < vocab, 0.0), cap)
            total += tl.where(column < vocab, tl.exp(r * (-2.0 * cap)), 0.0)
    shift = tl.log(tl.sum(total, 0))
    tl.store(loss_ptr + row, (shift + 2.0 * cap * at_target) * weight)
    for start in range(0, vocab, COLUMNS):  # the row still lies in the cache
        column = start + tl.arange(0, COLUMNS)
        inside = column < vocab
        r = _r(tl.load(line + column, inside, 0.0), cap)
        wrong = tl.exp(r * (-2.0 * cap) - shift) - tl.where(column == target, 1.0, 0.0)
        slope = wrong * (4.0 * weight * (r - r * r))  # 1 − tanh² = 4·(r − r²)
        tl.store(line + column, slope.to(logits_ptr.dtype.element_ty), inside)


@torch.library.custom_op("nanochat_hf::softcapped_nll_", mutates_args=("logits",))
def softcapped_nll_(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, cap: float) -> torch.Tensor:
    """Uncapped logits (n, V), targets (n) with −100 ignored, weights (n) float32 → weight·nll (n) float32.

    The logits become the gradient of Σ weight·nll with respect to them.
    """
    loss = torch.empty_like(weight)
    _kernel[(logits.shape[0],)](logits, target, weight, loss, logits.stride(0), cap, vocab=logits.shape[1], COLUMNS=COLUMNS, num_warps=16)
    return loss


@softcapped_nll_.register_fake
def _(logits, target, weight, cap):
    return torch.empty_like(weight)


@torch.library.custom_op("nanochat_hf::add_product_", mutates_args=("total",))
def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total (n, m) float32 += a (n, k) · b (k, m) of half precision, in the product itself: neither rounded nor read and written once more."""
    torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


@add_product_.register_fake
def _(total, a, b):
    return None
