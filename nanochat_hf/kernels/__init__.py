"""Fused kernels for training on CUDA, put in place of the model's plain formulas, which they are tested against."""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn

from .mlp import SquaredReluMLP

HIGHEST_CAP = 40.0  # the cross-entropy sums exp(capped logit − cap) without a maximum: float32 holds exp(−80)


def available(device) -> tuple[bool, str]:
    """Whether the kernels can run on `device`, and the reason."""
    if device.type != "cuda":
        return False, f"no Triton on {device.type}"
    if find_spec("triton") is None:
        return False, "triton is not installed"
    return (True, "CUDA with Triton") if torch.cuda.get_device_capability(device)[0] >= 8 else (False, "the GPU is older than Ampere")


def plain(*modules) -> bool:
    """Whether these are linear layers as they were made: not of float8, not quantised, without an adapter. Asked at each call, since
    Accelerate and PEFT may replace them later."""
    return all(type(module) is nn.Linear for module in modules)


def install(model) -> list[str]:
    """Give a NanochatForCausalLM its fused kernels; returns the names of those that fit it now.

    Layers whose projections are not `plain` keep the formulas, and so does the attention of models with an epsilon of their own or
    unrounded cosines (imported from transformers' NanoChat), which the kernel does not know, and the loss above a cap of HIGHEST_CAP.
    """
    config, installed, layers = model.config, set(), model.model.layers
    if config.final_logit_softcapping <= HIGHEST_CAP:
        model.nll_and_slope, model.add_product = nll_and_slope, add_product
        installed.add("softcapped cross-entropy")
    rotation_fits = config.rope_in_bfloat16 and config.rms_norm_eps is None and config.head_dim & (config.head_dim - 1) == 0
    for layer in layers:
        layer.self_attn.fused = queries_and_keys if rotation_fits else None
        layer.mlp.fused = squared_relu
    if rotation_fits and all(plain(layer.self_attn.q_proj, layer.self_attn.k_proj) for layer in layers):
        installed.add("rope and norm of queries and keys")
    if all(plain(layer.mlp.up_proj, layer.mlp.down_proj) for layer in layers):
        installed.add("squared ReLU")
    return sorted(installed)


def nll_and_slope(logits, target, weight, cap):
    """What the model's `nll_and_slope` computes, in the logits' own memory."""
    from .cross_entropy import softcapped_nll_

    nll = softcapped_nll_(logits, target, weight, cap)
    return nll, logits


def add_product(total, a, b):
    """What the model's `add_product` computes, without rounding the product to half precision."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        from .cross_entropy import add_product_

        add_product_(total, a, b)
    else:
        total += (a @ b).float()


def queries_and_keys(attention, x, rope):
    """What NanochatAttention.queries_and_keys computes, by one product for both and one kernel for rotation and norm."""
    if not plain(attention.q_proj, attention.k_proj):
        return attention.queries_and_keys(x, rope)
    from .rope import RopeNorm

    joined = torch.cat((attention.q_proj.weight, attention.k_proj.weight))
    heads = (attention.q_proj.out_features // attention.head_dim, attention.k_proj.out_features // attention.head_dim)
    return RopeNorm.apply(F.linear(x, joined), rope, *heads)


def squared_relu(mlp, x):
    """What NanochatMLP.squared_relu computes. A function, since torch.compile does not trace a bound `apply` (docs/log.md)."""
    if not plain(mlp.up_proj, mlp.down_proj):
        return mlp.squared_relu(x)
    return SquaredReluMLP.apply(x, mlp.up_proj.weight, mlp.down_proj.weight)
