"""Fused kernels for training on CUDA, put in place of the model's plain formulas, which they are tested against."""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn

from .mlp import squared_relu_mlp


def available(device) -> tuple[bool, str]:
    """Whether the kernels can run on `device`, and the reason."""
    if device.type != "cuda":
        return False, f"no Triton on {device.type}"
    if find_spec("triton") is None:
        return False, "triton is not installed"
    return (True, "CUDA with Triton") if torch.cuda.get_device_capability(device)[0] >= 8 else (False, "the GPU is older than Ampere")


def install(model) -> list[str]:
    """Give the layers of a NanochatForCausalLM their fused kernels; returns the names of those that fit.

    Layers whose projections are no plain nn.Linear (adapters, quantised weights) keep the plain formulas, and so does the attention of
    models with an epsilon of their own or unrounded cosines (imported from transformers' NanoChat), which the kernel does not know.
    """
    from .cross_entropy import softcapped_nll_

    def nll_and_slope(logits, target, weight, cap):
        nll = softcapped_nll_(logits, target, weight, cap)
        return nll, logits

    config, installed = model.config, {"softcapped cross-entropy"}
    model.nll_and_slope = nll_and_slope
    rotation_fits = config.rope_in_bfloat16 and config.rms_norm_eps is None and config.head_dim & (config.head_dim - 1) == 0
    for layer in model.model.layers:
        if rotation_fits and all(type(p) is nn.Linear for p in (layer.self_attn.q_proj, layer.self_attn.k_proj)):
            layer.self_attn.fused = queries_and_keys
            installed.add("rope and norm of queries and keys")
        if all(type(p) is nn.Linear for p in (layer.mlp.up_proj, layer.mlp.down_proj)):
            layer.mlp.fused = squared_relu_mlp
            installed.add("squared ReLU")
    return sorted(installed)


def queries_and_keys(attention, x, rope):
    """What NanochatAttention.queries_and_keys computes, by one product for both and one kernel for rotation and norm."""
    from .rope import RopeNorm

    joined = torch.cat((attention.q_proj.weight, attention.k_proj.weight))
    heads = (attention.q_proj.out_features // attention.head_dim, attention.k_proj.out_features // attention.head_dim)
    return RopeNorm.apply(F.linear(x, joined), rope, *heads)
