"""The output projection by a product of cuDNN that also adds the stream."""

import torch
from torch import Tensor, nn

from nanochat_hf.model.configuration_nanochat_hf import NanochatConfig
from nanochat_hf.model.ops_nanochat_hf import are_plain

from ..lib import cudnn_attention
from ..lib.cudnn_products import product_plus
from ..lib.devices import FLOAT8, HALF, lacks_hopper
from ..lib.weights import add_weight_gradient, joint_sum, weights_of

OP = "project_and_add"
SUMMED = (("o_proj",),)


def fits(config: NanochatConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """None on Hopper with cuDNN's frontend, in half precision, for widths that TMA can read."""
    if dtype == FLOAT8:
        return "float8 has no such product"
    if config.hidden_size % 8:
        return f"8 does not divide hidden_size={config.hidden_size}"
    missing = cudnn_attention.missing(device)
    return lacks_hopper(device, dtype) or (missing and missing[0])


def serves(y: Tensor, o_proj: nn.Module, stream: Tensor) -> bool:
    """Only for layers that no library has replaced, and where both tensors are in the same half precision."""
    return are_plain(o_proj) and y.is_cuda and y.dtype == stream.dtype in HALF


def run(y: Tensor, o_proj: nn.Module, stream: Tensor) -> Tensor:
    """stream (B, T, C) + o_proj(y)."""
    (weight,) = weights_of((o_proj,), y.dtype)
    return LinearPlus.apply(y, weight, stream, joint_sum(o_proj))


class LinearPlus(torch.autograd.Function):
    """y (…, K), weight (W, K), stream (…, W) of y's dtype → stream + y·weightᵀ.

    The weight's gradient is added to its sum, where that is given.
    """

    @staticmethod
    def forward(ctx, y: Tensor, weight: Tensor, stream: Tensor, total: Tensor | None = None) -> Tensor:
        """The stream after the projection."""
        flat, w = y.reshape(-1, y.shape[-1]), weight.to(y.dtype)
        ctx.save_for_backward(flat, w, total)
        ctx.dtype = weight.dtype
        return product_plus(flat, w, stream.reshape(-1, stream.shape[-1])).view(stream.shape)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, weight and stream."""
        flat, w, total = ctx.saved_tensors
        with torch.autocast(d.device.type, enabled=False):
            d_flat = d.reshape(-1, d.shape[-1])
            dw = (d_flat.mT @ flat).to(ctx.dtype) if total is None else add_weight_gradient(total, d_flat, flat)
            return (d_flat @ w).view(*d.shape[:-1], -1), dw, d, None
