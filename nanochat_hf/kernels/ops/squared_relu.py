"""The MLP's squared ReLU within its products, keeping one wide activation for backward in place of two."""

import torch
from torch import Tensor, nn

from nanochat_hf.model.configuration_nanochat_hf import NanochatConfig
from nanochat_hf.model.ops_nanochat_hf import are_plain

from ..lib.devices import hopper_takes, lacks_triton
from ..lib.weights import add_weight_gradient, computing, joint_sum, weights_of

OP = "squared_relu_mlp"
SUMMED = (("up_proj",), ("down_proj",))


def fits(config: NanochatConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """None on a GPU with Triton."""
    return lacks_triton(device)


def serves(x: Tensor, up_proj: nn.Module, down_proj: nn.Module) -> bool:
    """Only for layers that no library has replaced."""
    return are_plain(up_proj, down_proj)


def run(x: Tensor, up_proj: nn.Module, down_proj: nn.Module) -> Tensor:
    """A function, since torch.compile does not trace a bound `apply`."""
    (up,), (down,) = (weights_of((layer,), computing(x)) for layer in (up_proj, down_proj))
    return SquaredReluMLP.apply(x, up, down, joint_sum(up_proj), joint_sum(down_proj))


class SquaredReluMLP(torch.autograd.Function):
    """x (…, C), up (W, C), down (C, W) → relu(x·upᵀ)²·downᵀ (…, C), in autocast's dtype.

    Only a = relu(u)² is kept for backward. Its slope is 2·relu(u) = 2·√a, so u (…, W), the largest activation of a layer, need
    not be kept. The weights' gradients go into their sums, where those are given.
    """

    @staticmethod
    def forward(ctx, x, up, down, up_sum=None, down_sum=None):
        dtype = computing(x)
        ctx.dtypes = x.dtype, up.dtype, down.dtype
        with torch.autocast(x.device.type, enabled=False):
            flat, up, down = x.reshape(-1, x.shape[-1]).to(dtype), up.to(dtype), down.to(dtype)
            if hopper_takes(flat, flat.shape[1], up.shape[0]):
                from ..lib.squared_relu import squared_relu_up

                squared = squared_relu_up(flat, up)
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
            if hopper_takes(dy_flat, dy_flat.shape[1], squared.shape[1]):
                from ..lib.squared_relu import squared_relu_down_backward

                slope = squared_relu_down_backward(dy_flat, down, squared)
            else:
                slope = (dy_flat @ down) * (2 * squared.sqrt())
            dx = (slope @ up).to(ctx.dtypes[0]).view(*dy.shape[:-1], -1)
            d_up = _gradient(slope, flat, ctx.dtypes[1], up_sum)
            d_down = _gradient(dy_flat, squared, ctx.dtypes[2], down_sum)
        return dx, d_up, d_down, None, None


def _gradient(g, x, dtype, total):
    # gᵀ·x, or None where it was added to the sum
    if total is not None:
        return add_weight_gradient(total, g, x)
    if g.is_cuda:
        from ..lib.weight_gradient import weight_gradient

        return weight_gradient(g, x, dtype)
    return (g.mT @ x).to(dtype)
