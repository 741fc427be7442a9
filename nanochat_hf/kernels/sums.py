"""Gradients summed over the micro-batches of a step inside the kernels that make them: a product that adds to what is there spares a pass over memory
of its own, which reads two tensors of the weight's size and writes one.

A module takes part through its `weight_sum` (like its weight, float32), which is its weight's `grad` too; of modules whose gradients come from one
product the first has one for all of them. Kernels add to it and return no gradient; what has no such kernel is summed by autograd, in the same place.
"""

from contextlib import contextmanager

import torch


def of(module):
    """Where a kernel may add the gradient of the weight of this module, or of its group; None where autograd sums."""
    return None if module.weight.grad is None else getattr(module, "weight_sum", None)


def _fits(group):
    weights = [module.weight for module in group]
    return all(w.requires_grad and w.dtype == torch.float32 and type(w.data) is torch.Tensor and w.grad is None for w in weights)


@contextmanager
def kept(groups):
    """While this lasts the weights of `groups` (lists of modules) have sums where they are trained, in float32 and whole; yields whether any has.

    Gradients must then be zeroed after a step, not set to None. They are None before and after.
    """
    groups = [group for group in groups if _fits(group)]
    try:
        for group in groups:
            weights = [module.weight for module in group]
            group[0].weight_sum = total = weights[0].new_zeros(sum(map(len, weights)), *weights[0].shape[1:])
            for weight, part in zip(weights, total.split([len(weight) for weight in weights]), strict=True):
                weight.grad = part
        yield bool(groups)
    finally:
        for group in groups:
            for module in group:
                module.weight.grad = None
            vars(group[0]).pop("weight_sum", None)


@torch.library.custom_op("nanochat_hf::add_weight_gradient", mutates_args=("total",))
def add_weight_gradient(total: torch.Tensor, g: torch.Tensor, x: torch.Tensor, turned: bool) -> None:
    """total (G, K) float32 += gᵀ·x of g (N, G) and x (N, K); total (K, G) where `turned`."""
    if g.is_cuda:
        try:
            from .weight_gradient import add_by_pieces
        except ImportError:  # a Triton without tensor descriptors
            add_by_pieces = None
        if add_by_pieces and add_by_pieces(total, g, x, turned):
            return
        if g.dtype in (torch.bfloat16, torch.float16):
            from .cross_entropy import add_product_

            return add_product_(total, *((x.mT, g) if turned else (g.mT, x)))
    total += (x.mT @ g if turned else g.mT @ x).float()


@add_weight_gradient.register_fake
def _(total, g, x, turned):
    return None
