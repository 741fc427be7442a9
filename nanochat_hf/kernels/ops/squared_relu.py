"""The MLP with the squared ReLU inside its products; it keeps one wide activation for backward instead of two."""

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
    """x (B, T, C) → (B, T, C)."""
    (up,), (down,) = (weights_of((layer,), computing(x)) for layer in (up_proj, down_proj))
    return SquaredReluMLP.apply(x, up, down, joint_sum(up_proj), joint_sum(down_proj))


class SquaredReluMLP(torch.autograd.Function):
    """x (…, C), up (W, C), down (C, W) → relu(x·upᵀ)²·downᵀ (…, C), in autocast's dtype.

    Of the two wide activations only a = relu(u)² is kept for backward: its slope is 2·relu(u) = 2·√a, so u (…, W) is
    not needed. The weights' gradients are added to their sums, where those are given.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, up: Tensor, down: Tensor, up_sum: Tensor | None = None, down_sum: Tensor | None = None
    ) -> Tensor:
        """The MLP's output in autocast's dtype."""
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
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of both weights."""
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
