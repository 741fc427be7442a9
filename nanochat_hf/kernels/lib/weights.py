"""How a kernel reads the weights of layers, and where it puts their gradients.

optim/gradient_sums.py may have given weights a float32 sum over micro-batches. A kernel then adds to the sum and
returns no gradient, which saves a pass over memory. The copy in half precision, rounded once a step, saves another.
"""

import torch
from torch import Tensor, nn


def computing(x: Tensor) -> torch.dtype:
    """The dtype in which products of x are taken: autocast's, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def joint_sum(layer: nn.Module) -> Tensor | None:
    """The sum for the gradients of this layer's weight and of those multiplied with it, below one another.

    None where autograd sums: also after a `zero_grad` that has set gradients to None.
    """
    return None if layer.weight.grad is None else getattr(layer.weight, "joint_grad", None)


def weights_of(layers: tuple[nn.Module, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """The weights as a product in `dtype` takes them: each one, or the joint copy and None for the others."""
    half = getattr(layers[0].weight, "joint_half", None)
    known = half is not None and half.dtype == dtype and joint_sum(layers[0]) is not None
    return (half, *[None] * (len(layers) - 1)) if known else tuple(layer.weight for layer in layers)


@torch.library.custom_op("nanochat_hf::add_product_", mutates_args=("total",))
def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (n, m) float32 += a (n, k) · b (k, m) of half precision within the product, so that it is never rounded."""
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
