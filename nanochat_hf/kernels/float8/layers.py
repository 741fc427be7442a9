"""The parts of a layer with float8 products. Each keeps only transposed float8 copies for backward.

The input of a layer is normed. So no element of x exceeds √C, no row of x is longer than √C, and by the inequality of
Cauchy and Schwarz the products of x are bounded too. To find a maximum takes a pass over memory; a bound takes none. A
bound is good enough where float8 has range to spare: always for e5m2, and for e4m3 with the squared ReLU
(docs/records/2026-11-25-float8-prediction). Letters: N tokens, C hidden_size, W = 4C intermediate_size.
"""

import torch
from torch import Tensor

from ..lib.weights import computing
from .products import E4M3, E5M2, cast, largest, longest, product, scaled, slope, squared_relu, transposed, unit_of


def _normed(x):
    # (…, C) → (N, C) e4m3, its transpose, its unit. torch's operations, so that the compiler fuses them with the norm.
    flat = x.reshape(-1, x.shape[-1])
    unit = unit_of(torch.full((), flat.shape[1] ** 0.5, device=x.device), E4M3)
    flat = scaled(flat, unit, E4M3)
    return flat, transposed(flat), unit


def _weights(*weights):
    # the weights in float8, concatenated along their outputs; the transpose; the unit
    unit = unit_of(torch.stack([largest(weight) for weight in weights]).amax(), E4M3)
    return *cast(weights, unit, E4M3, 0), unit


def _gradients(*gradients):
    # the gradients in float8, concatenated along the channels; the transpose; the unit
    flat = [g.reshape(-1, g.shape[-1]) for g in gradients]
    unit = unit_of(torch.stack([largest(g) for g in flat]).amax(), E5M2)
    return *cast(flat, unit, E5M2, 1), unit


class Projections(torch.autograd.Function):
    """Normed x (…, C), weights of q, k and v → queries and keys (…, (H + K)·D) and values (…, K·D)."""

    @staticmethod
    def forward(ctx, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys in one tensor, and values; keeps transposes in float8."""
        ctx.dtype, ctx.shape, ctx.sizes = x.dtype, x.shape, [weight.shape[0] for weight in (q, k, v)]
        ctx.weight_dtype = q.dtype
        dtype, border = computing(x), q.shape[0] + k.shape[0]
        with torch.autocast(x.device.type, enabled=False):
            x8, x_t, x_unit = _normed(x)
            w8, w_t, w_unit = _weights(q, k, v)
            both, values = (product(x8, part, (x_unit, w_unit), dtype) for part in (w8[:border], w8[border:]))
        ctx.save_for_backward(x_t, x_unit, w_t, w_unit)
        return both.view(*x.shape[:-1], -1), values.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, d_both: Tensor, d_values: Tensor) -> tuple[Tensor, ...]:
        """Gradients of x and of the three weights."""
        x_t, x_unit, w_t, w_unit = ctx.saved_tensors
        with torch.autocast(d_both.device.type, enabled=False):
            g, g_t, unit = _gradients(d_both, d_values)
            dx = product(g, w_t, (unit, w_unit), ctx.dtype).view(ctx.shape)
            return dx, *product(g_t, x_t, (unit, x_unit), ctx.weight_dtype, fast=False).split(ctx.sizes)


class Linear(torch.autograd.Function):
    """x (…, inputs), weight (outputs, inputs) → x·weightᵀ (…, outputs), for any x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        """The product; keeps transposes of both factors in float8."""
        ctx.dtype, ctx.shape, ctx.weight_dtype = x.dtype, x.shape, weight.dtype
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1])
            unit = unit_of(largest(flat), E4M3)
            x8, x_t = cast([flat], unit, E4M3, 1)
            w8, w_t, w_unit = _weights(weight)
        y = product(x8, w8, (unit, w_unit), computing(x))
        ctx.save_for_backward(x_t, unit, w_t, w_unit)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the weight."""
        x_t, x_unit, w_t, w_unit = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            g, g_t, unit = _gradients(dy)
            dx = product(g, w_t, (unit, w_unit), ctx.dtype).view(ctx.shape)
            return dx, product(g_t, x_t, (unit, x_unit), ctx.weight_dtype, fast=False)


class SquaredReluMLP(torch.autograd.Function):
    """Normed x (…, C), up (W, C), down (C, W) → relu(x·upᵀ)²·downᵀ (…, C).

    The only wide activation kept is aᵀ = relu(u)², one byte an element; backward needs the slope 2·relu(u) = 2·√a.
    """

    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """The MLP's output; keeps transposes in float8."""
        ctx.dtype, ctx.shape, ctx.weight_dtypes, dtype = x.dtype, x.shape, (up.dtype, down.dtype), computing(x)
        with torch.autocast(x.device.type, enabled=False):
            x8, x_t, x_unit = _normed(x)
            up8, up_t, up_unit = _weights(up)
            down8, down_t, down_unit = _weights(down)
            u_bound = longest(up) * x.shape[-1] ** 0.5
            a_unit = unit_of(u_bound.square(), E4M3)
            a, a_t = squared_relu(x8, up8, x_unit, up_unit, a_unit)
            y = product(a, down8, (a_unit, down_unit), dtype)
            slope_bound = 2 * u_bound * longest(down.mT)  # times the norm of the gradient's longest row
        ctx.save_for_backward(x_t, x_unit, a_t, a_unit, up_t, up_unit, down_t, down_unit, slope_bound)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x and of both weights."""
        x_t, x_unit, a_t, a_unit, up_t, up_unit, down_t, down_unit, slope_bound = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            flat = dy.reshape(-1, dy.shape[-1])
            g, g_t, unit = _gradients(flat)
            s_unit = unit_of(slope_bound * longest(flat), E5M2)
            s, s_t = slope(g, down_t, unit, down_unit, a_t, a_unit, s_unit)
            dx = product(s, up_t, (s_unit, up_unit), ctx.dtype).view(ctx.shape)
            d_up = product(s_t, x_t, (s_unit, x_unit), ctx.weight_dtypes[0], fast=False)
            return dx, d_up, product(g_t, a_t, (unit, a_unit), ctx.weight_dtypes[1], fast=False)
