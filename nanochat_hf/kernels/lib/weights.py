"""How a kernel reads the weights of layers, and where it puts their gradients.

optim/gradient_sums.py can give weights a float32 sum over micro-batches. A kernel then adds to the sum and returns no
gradient, which saves a pass over memory. A copy in half precision, rounded once a step, saves another
(docs/records/2026-11-26-gradients-in-products).
"""

from typing import Any

import torch
from torch import Tensor, nn


def weight_of(layer: nn.Module) -> Any:
    """The weight of a linear layer or table. Any: torch declares no type for it, nor for what its sum adds to it."""
    return layer.weight


def computing(x: Tensor) -> torch.dtype:
    """The dtype of products of x: autocast's, where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def joint_sum(layer: nn.Module) -> Tensor | None:
    """The sum of gradients for this layer's weight and for those that the same product multiplies, one below the other.

    None where autograd sums, so also after a `zero_grad` that has set gradients to None.
    """
    weight = weight_of(layer)
    return None if weight.grad is None else getattr(weight, "joint_grad", None)


def weights_of(layers: tuple[nn.Module, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """The weights for a product in `dtype`.

    Each layer's own; or, where there is one of this dtype, their joint copy and None for each layer after the first.
    """
    half = getattr(weight_of(layers[0]), "joint_half", None)
    known = half is not None and half.dtype == dtype and joint_sum(layers[0]) is not None
    return (half, *[None] * (len(layers) - 1)) if known else tuple(weight_of(layer) for layer in layers)


@torch.library.custom_op("nanochat_hf::add_product_", mutates_args=("total",))
def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (n, m) float32 += a (n, k) · b (k, m) of half precision; the product is added before it is rounded."""
    torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


@add_product_.register_fake
def _(total, a, b):
    return None


@torch.library.custom_op("nanochat_hf::add_weight_gradient", mutates_args=("total",))
def add_weight_gradient(total: Tensor, g: Tensor, x: Tensor) -> None:
    """total (G, K) float32 += gᵀ·x of g (N, G) and x (N, K)."""
    if g.is_cuda:
        from .weight_gradient import add_by_pieces

        if add_by_pieces(total, g, x):
            return
        if g.dtype in (torch.bfloat16, torch.float16):
            return add_product_(total, g.mT, x)
    total += (g.mT @ x).float()


@add_weight_gradient.register_fake
def _(total, g, x):
    return None
