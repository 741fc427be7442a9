"""The MLP's squared ReLU, keeping one wide activation for backward in place of two."""

import torch

from .sums import add_weight_gradient, computing

try:
    from . import matmul, weight_gradient  # want Triton's tensor descriptors
except ImportError:
    matmul = weight_gradient = None


class SquaredReluMLP(torch.autograd.Function):
    """x (…, C), up (4C, C), down (C, 4C) → relu(x·upᵀ)²·downᵀ (…, C), in autocast's dtype. The weights' gradients go into their sums, where given.

    Only a = relu(u)² is kept: its slope is 2·relu(u) = 2·√a, so u (…, 4C), the largest activation of a layer, need not be.
    """

    @staticmethod
    def forward(ctx, x, up, down, up_sum=None, down_sum=None):
        dtype = computing(x)
        ctx.dtypes = x.dtype, up.dtype, down.dtype
        with torch.autocast(x.device.type, enabled=False):
            flat, up, down = x.reshape(-1, x.shape[-1]).to(dtype), up.to(dtype), down.to(dtype)
            if matmul and matmul.suits(flat, flat.shape[1], up.shape[0]):
                squared = matmul.squared_relu_up(flat, up)
            else:
                squared = torch.relu(flat @ up.mT).square()
            y = squared @ down.mT
        ctx.save_for_backward(flat, squared, up, down, up_sum, down_sum)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        flat, squared, up, down, up_sum, down_sum = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            dy_flat = dy.reshape(-1, dy.shape[-1]).to(flat.dtype)
            if matmul and matmul.suits(dy_flat, dy_flat.shape[1], squared.shape[1]):
                slope = matmul.squared_relu_down_backward(dy_flat, down, squared)
            else:
                slope = (dy_flat @ down) * (2 * squared.sqrt())
            dx = (slope @ up).to(ctx.dtypes[0]).view(*dy.shape[:-1], -1)
            d_up, d_down = _gradient(slope, flat, ctx.dtypes[1], up_sum), _gradient(dy_flat, squared, ctx.dtypes[2], down_sum)
        return dx, d_up, d_down, None, None


def _gradient(g, x, dtype, total):
    # gᵀ·x, or None where it was added to the total
    if total is not None:
        return add_weight_gradient(total, g, x)
    return weight_gradient.weight_gradient(g, x, dtype) if weight_gradient and g.is_cuda else (g.mT @ x).to(dtype)
