"""Soft-capped cross-entropy and its gradient in one kernel that reads and writes the logits once, long rows twice.

The cap bounds the logits, so the sum of exponentials does not need their maximum. Letters: n tokens of a chunk,
V vocabulary.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_hf.model.configuration_nanochat_hf import NanochatConfig

from ..lib.devices import lacks_triton

OP = "nll_and_slope"
HIGHEST_CAP = 40.0  # the sum has terms exp(capped logit − cap) ≥ exp(−2·cap), and float32 can hold exp(−80)

COLUMNS = 32768  # logits that a program holds at one time


def fits(config: NanochatConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """None on a GPU with Triton, for caps up to HIGHEST_CAP."""
    cap = config.final_logit_softcapping
    return f"final_logit_softcapping={cap} is above {HIGHEST_CAP}" if cap > HIGHEST_CAP else lacks_triton(device)


def serves(logits: Tensor, target: Tensor, weight: Tensor, cap: float) -> bool:
    """Whether this call's cap is not too high: reinforcement learning divides it by the temperature."""
    return cap <= HIGHEST_CAP


def run(logits: Tensor, target: Tensor, weight: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """weight·nll (n), and the gradient of its sum, which overwrites the logits."""
    return softcapped_nll_(logits, target, weight, cap), logits


@triton.jit
def _r(z, inner):
    # r with tanh(z/cap) = 1 − 2r, so that soft-cap and exponential take two functions of the hardware and not three.
    # rsqrt(x)² is cheaper than 1/x here: one instruction instead of several.
    root = tl.rsqrt(tl.exp2(z.to(tl.float32) * inner) + 1.0)
    return root * root


@triton.jit
def _row(
    logits_ptr, target_ptr, weight_ptr, loss_ptr, stride, cap, inner, outer, vocab: tl.constexpr, BLOCK: tl.constexpr
):
    # As _kernel, for rows that fit into one program, so that each logit is read and computed once. Until the sum is
    # known the slopes are kept in half precision, which takes half the registers. So two programs fit on a
    # multiprocessor, and one computes while the other reads.
    column, EVEN = tl.arange(0, BLOCK), vocab == BLOCK
    row = tl.program_id(0).to(tl.int64)
    target, weight = tl.load(target_ptr + row), tl.load(weight_ptr + row)
    weight = tl.where(target >= 0, weight, 0.0)
    line = logits_ptr + row * stride
    at_target = _r(tl.load(line + tl.maximum(target, 0)), inner)
    r = _r(tl.load(line + column) if EVEN else tl.load(line + column, column < vocab, 0.0), inner)
    power = tl.exp2(r * -outer)  # exp(cap·tanh(z/cap) − cap)
    if not EVEN:
        power = tl.where(column < vocab, power, 0.0)
    slope = (power * (r - r * r)).to(logits_ptr.dtype.element_ty)  # 1 − tanh² = 4·(r − r²)
    total = tl.sum(power, 0)
    tl.store(loss_ptr + row, (tl.log(total) + 2.0 * cap * at_target) * weight)
    weight *= 4.0
    slope = (slope.to(tl.float32) * (weight / total)).to(logits_ptr.dtype.element_ty)
    if EVEN:
        tl.store(line + column, slope)
    else:
        tl.store(line + column, slope, column < vocab)
    tl.debug_barrier()  # the whole row is written; now correct the target's element
    wrong = (tl.exp2(at_target * -outer) / total - 1.0) * (weight * (at_target - at_target * at_target))
    tl.store(line + tl.maximum(target, 0), wrong.to(logits_ptr.dtype.element_ty), target >= 0)


@triton.jit
def _kernel(
    logits_ptr, target_ptr, weight_ptr, loss_ptr, stride, cap, inner, outer, vocab: tl.constexpr, COLUMNS: tl.constexpr
):
    # inner = 2·log2(e)/cap and outer = 2·log2(e)·cap, since the hardware computes powers of 2
    row = tl.program_id(0).to(tl.int64)
    target, weight = tl.load(target_ptr + row), tl.load(weight_ptr + row)
    weight = tl.where(target >= 0, weight, 0.0)
    line, EVEN = logits_ptr + row * stride, vocab % COLUMNS == 0
    at_target = _r(tl.load(line + tl.maximum(target, 0)), inner)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, vocab, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        if EVEN:
            total += tl.exp2(_r(tl.load(line + column), inner) * -outer)  # exp(cap·tanh(z/cap) − cap)
        else:
            r = _r(tl.load(line + column, column < vocab, 0.0), inner)
            total += tl.where(column < vocab, tl.exp2(r * -outer), 0.0)
    total = tl.sum(total, 0)
    tl.store(loss_ptr + row, (tl.log(total) + 2.0 * cap * at_target) * weight)
    shift, weight = tl.log2(total), 4.0 * weight  # 1 − tanh² = 4·(r − r²)
    for start in range(0, vocab, COLUMNS):  # the row is still in the cache
        column = start + tl.arange(0, COLUMNS)
        if EVEN:
            r = _r(tl.load(line + column), inner)
            tl.store(
                line + column, (tl.exp2(r * -outer - shift) * (weight * (r - r * r))).to(logits_ptr.dtype.element_ty)
            )
        else:
            r = _r(tl.load(line + column, column < vocab, 0.0), inner)
            slope = tl.exp2(r * -outer - shift) * (weight * (r - r * r))
            tl.store(line + column, slope.to(logits_ptr.dtype.element_ty), column < vocab)
    tl.debug_barrier()  # the whole row is written; now correct the target's element
    slope = (tl.exp2(at_target * -outer - shift) - 1.0) * (weight * (at_target - at_target * at_target))
    tl.store(line + tl.maximum(target, 0), slope.to(logits_ptr.dtype.element_ty), target >= 0)


@torch.library.custom_op("nanochat_hf::softcapped_nll_", mutates_args=("logits",))
def softcapped_nll_(logits: Tensor, target: Tensor, weight: Tensor, cap: float) -> Tensor:
    """Uncapped logits (n, V), targets (n) with −100 ignored, weights (n) float32 → weight·nll (n) float32.

    The logits become the gradient of Σ weight·nll with respect to them.
    """
    loss = torch.empty_like(weight)
    inner, outer = 2 / math.log(2) / cap, 2 / math.log(2) * cap
    (n, vocab), scalars = logits.shape, (logits.stride(0), cap, inner, outer)
    # not float16: slopes not yet divided by the sum would underflow to 0
    if vocab <= COLUMNS and logits.dtype != torch.float16:
        _row[(n,)](
            logits, target, weight, loss, *scalars, vocab=vocab, BLOCK=triton.next_power_of_2(vocab), num_warps=16
        )
    else:
        _kernel[(n,)](logits, target, weight, loss, *scalars, vocab=vocab, COLUMNS=COLUMNS, num_warps=16)
    return loss


@softcapped_nll_.register_fake
def _(logits, target, weight, cap):
    return torch.empty_like(weight)
