"""Gradients summed over the micro-batches of a step inside the kernels that make them, and weights rounded once a step.

A product that adds to what is there spares a pass over memory of its own, which reads two tensors of the weight's size and writes one; and so does one
that finds the weight in half precision.

A module takes part through `weight_sum` (like its weight, float32), which is its weight's `grad` too, and `weight_half`, its weight rounded; of modules
whose gradients come from one product the first has one of each for all of them. Kernels add to the sum and return no gradient; what has no such kernel
is summed by autograd, in the same place.
"""

from contextlib import contextmanager

import torch


def of(module):
    """Where a kernel may add the gradient of the weight of this module, or of its group; None where autograd sums."""
    return None if module.weight.grad is None else getattr(module, "weight_sum", None)


def weights_of(modules, dtype):
    """The weights of a group of modules as a product in `dtype` may take them: one tensor for all where they are rounded already and their gradients have
    a sum, else each by itself."""
    half = getattr(modules[0], "weight_half", None)
    known = half is not None and half.dtype == dtype and of(modules[0]) is not None
    return (half, *[None] * (len(modules) - 1)) if known else tuple(module.weight for module in modules)


def computing(x):
    """The dtype in which products of x are taken: autocast's, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _fits(group):
    weights = [module.weight for module in group]
    return all(w.dtype == torch.float32 and type(w.data) is torch.Tensor and w.grad is None for w in weights)


class Kept:
    """Sums and, of `dtype`, rounded weights of groups of modules."""

    def __init__(self, groups, dtype):
        self.groups, self.weights, self.halves = groups, [], []
        for group in groups:
            weights = [module.weight for module in group]
            shape, sizes = (sum(map(len, weights)), *weights[0].shape[1:]), [len(weight) for weight in weights]
            group[0].weight_sum = total = weights[0].new_zeros(shape)
            for weight, part in zip(weights, total.split(sizes), strict=True):
                weight.grad = part
            if dtype is not None:
                group[0].weight_half = half = weights[0].new_empty(shape, dtype=dtype)
                self.weights += weights
                self.halves += half.split(sizes)

    @torch.no_grad()
    def refresh(self):
        """Round the weights as they are now: before the first micro-batch of each step."""
        if self.halves:
            torch._foreach_copy_(self.halves, [weight.data for weight in self.weights])

    def release(self):
        """Leave nothing behind; gradients are None."""
        for group in self.groups:
            for module in group:
                module.weight.grad = None
            vars(group[0]).pop("weight_sum", None), vars(group[0]).pop("weight_half", None)


@contextmanager
def kept(groups, dtype=None):
    """While this lasts the weights of `groups` (lists of modules) have sums where they are float32 and whole, and where `dtype` is given they are rounded
    to it; yields a Kept, None where none takes part.

    Gradients must then be zeroed after a step, not set to None, and the Kept be refreshed before it. They are None before and after.
    """
    groups = [group for group in groups if _fits(group)]
    holder = Kept(groups, dtype) if groups else None
    try:
        yield holder
    finally:
        if holder:
            holder.release()


@torch.library.custom_op("nanochat_hf::add_weight_gradient", mutates_args=("total",))
def add_weight_gradient(total: torch.Tensor, g: torch.Tensor, x: torch.Tensor) -> None:
    """total (G, K) float32 += gᵀ·x of g (N, G) and x (N, K)."""
    if g.is_cuda:
        try:
            from .weight_gradient import add_by_pieces
        except ImportError:  # a Triton without tensor descriptors
            add_by_pieces = None
        if add_by_pieces and add_by_pieces(total, g, x):
            return
        if g.dtype in (torch.bfloat16, torch.float16):
            from .cross_entropy import add_product_

            return add_product_(total, g.mT, x)
    total += (g.mT @ x).float()


@add_weight_gradient.register_fake
def _(total, g, x):
    return None
