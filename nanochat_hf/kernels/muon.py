"""Muon's passes over memory as Triton kernels. They read and write n tensors where they are, without stacking them.

Letters: n matrices of r rows and c columns. Each kernel gets the addresses of the n tensors as a table on the device.
"""

from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements of a program
ALIGNMENT = 16  # bytes that a thread loads at once


@triton.jit
def _at(table_ptr, i, element):
    """Addresses of the elements of the i-th float32 tensor of a table, each tensor aligned."""
    base = tl.load(table_ptr + i).to(tl.pointer_type(tl.float32))
    return tl.multiple_of(base + element, 16)


@triton.jit
def _momentum(grads_ptr, buffer_ptr, out_ptr, squares_ptr, ok_ptr, momentum, size, BLOCK: tl.constexpr):
    i, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    element = block * BLOCK + tl.arange(0, BLOCK)
    inside, ok = element < size, tl.load(ok_ptr) != 0
    grad = tl.load(_at(grads_ptr, i, element), inside, 0.0)
    grad = tl.where(ok, grad, 0.0)  # `where` and not a product with 0: the gradient may be infinite or NaN
    buffer = tl.load(buffer_ptr + i * size + element, inside, 0.0)
    buffer += tl.where(ok, 1.0 - momentum, 0.0) * (grad - buffer)
    tl.store(buffer_ptr + i * size + element, buffer, inside)
    update = grad + tl.where(ok, momentum, 0.0) * (buffer - grad)
    tl.store(out_ptr + i * size + element, update.to(out_ptr.dtype.element_ty), inside)
    tl.store(squares_ptr + i * tl.num_programs(0) + block, tl.sum(update * update, 0))


@triton.jit
def _apply(
    params_ptr,
    out_ptr,
    update_ptr,
    factor_ptr,
    ok_ptr,
    rate,
    weight_decay,
    size,
    c: tl.constexpr,
    BY_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    value = tl.load(_at(params_ptr, i, element), inside, 0.0)
    update = tl.load(update_ptr + i * size + element, inside, 0.0).to(tl.float32)
    place = i * (size // c) + element // c if BY_ROW else i * c + element % c
    update *= tl.load(factor_ptr + place, inside, 0.0)
    decay = tl.where(update * value >= 0, weight_decay * value, 0.0)
    rate = tl.where(tl.load(ok_ptr) != 0, rate, 0.0)
    tl.store(_at(out_ptr, i, element), value - rate * (update + decay), inside)


class Tables:
    """Tables of addresses on the device, copied again only when a tensor has moved: a copy costs more than a launch."""

    def __init__(self):
        self.kept: dict[str, tuple[list[int], Tensor]] = {}

    def get(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        """The int64 addresses (n) of a list of tensors of one device."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        if name not in self.kept or self.kept[name][0] != addresses:
            self.kept[name] = addresses, torch.tensor(addresses).to(tensors[0].device, non_blocking=True)
        return self.kept[name][1]


def fit(tensors: Iterable[Tensor], width: int) -> bool:
    """Whether the kernels can read these tensors in place: contiguous, aligned float32, `width` a multiple of 16."""
    return width % ALIGNMENT == 0 and all(
        t.dtype == torch.float32 and t.is_contiguous() and t.data_ptr() % ALIGNMENT == 0 for t in tensors
    )


def momentum_(grads: Tensor, buffer: Tensor, momentum: float, ok: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Move buffers (n, r, c) towards the gradients → Nesterov's direction (n, r, c) of `dtype`, its norms (n, 1, 1).

    `grads` is a table (n). Where the 0-d bool `ok` is false the buffers stay and the direction is zero.
    """
    n, r, c = buffer.shape
    blocks = triton.cdiv(r * c, BLOCK)
    out = torch.empty_like(buffer, dtype=dtype)
    squares = buffer.new_empty(n, blocks)
    _momentum[(blocks, n)](grads, buffer, out, squares, ok, momentum, r * c, BLOCK=BLOCK, num_warps=8)
    return out, squares.sum(1).sqrt().view(n, 1, 1)


def apply(
    params: Tensor, out: Tensor, update: Tensor, factor: Tensor, rate: float, weight_decay: float, ok: Tensor
) -> None:
    """Write param − rate·(update·factor + cautious decay), from table `params` (n) to table `out` (n).

    update (n, r, c); factor (n, r, 1) or (n, 1, c), float32 and contiguous. Where `ok` is false the values are copied.
    """
    n, r, c = update.shape
    by_row = factor.shape[-1] == 1
    _apply[(triton.cdiv(r * c, BLOCK), n)](
        params, out, update, factor, ok, rate, weight_decay, r * c, c=c, BY_ROW=by_row, BLOCK=BLOCK, num_warps=8
    )
