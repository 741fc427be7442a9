"""Gradients summed over the micro-batches of a step, in one float32 tensor that kernels and autograd share.

A kernel that adds its product to the sum saves a pass over memory, which would read two tensors and write one. A
kernel that finds the weight in half precision, rounded once a step, saves another.

A weight that takes part has these attributes, and its `grad` is its sum:
- `main_grad`: its sum, float32, under the name that Megatron and Transformer Engine use;
- `joint_grad`: on the first of the weights that one product multiplies, the sums of all of them below one another;
- `joint_half`: on the same weight, those weights in half precision, as they were at the last `refresh`.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class GradientSums:
    """Sums and rounded copies of the weights of groups of layers."""

    def __init__(self, groups: list[list[nn.Module]], dtype: torch.dtype | None):
        # Any, because the weights carry the attributes above
        self.groups: list[list[Any]] = [[layer.weight for layer in group] for group in groups]
        self.rounded: list[torch.Tensor] = []  # a copy of each weight, part of its group's
        for weights in self.groups:
            shape, sizes = (sum(map(len, weights)), *weights[0].shape[1:]), [len(weight) for weight in weights]
            weights[0].joint_grad = weights[0].data.new_zeros(shape)
            for weight, part in zip(weights, weights[0].joint_grad.split(sizes), strict=True):
                weight.grad = weight.main_grad = part
            if dtype is not None:
                weights[0].joint_half = weights[0].data.new_empty(shape, dtype=dtype)
                self.rounded += weights[0].joint_half.split(sizes)

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the weights as they are now; before the first micro-batch of each step."""
        if self.rounded:
            torch._foreach_copy_(self.rounded, [weight.data for weights in self.groups for weight in weights])

    def release(self) -> None:
        """Leave nothing behind; gradients are None."""
        for weight in (weight for weights in self.groups for weight in weights):
            weight.grad = None
            for name in ("main_grad", "joint_grad", "joint_half"):
                vars(weight).pop(name, None)


def _fits(group: list[nn.Module]) -> bool:
    weights: list[Any] = [layer.weight for layer in group]
    return all(w.dtype == torch.float32 and type(w.data) is torch.Tensor and w.grad is None for w in weights)


@contextmanager
def gradient_sums(
    groups: Iterable[list[nn.Module]], dtype: torch.dtype | None = None
) -> Generator[GradientSums | None, None, None]:
    """While this lasts, the weights of `groups` that are float32 and whole have sums; it yields None if there are none.

    `dtype` is the half precision to round weights to, None for no copies. Within it, zero gradients after a step
    instead of setting them to None, and call `refresh` before each step. Gradients are None before and after.
    """
    groups = [group for group in groups if _fits(group)]
    sums = GradientSums(groups, dtype) if groups else None
    try:
        yield sums
    finally:
        if sums is not None:
            sums.release()
