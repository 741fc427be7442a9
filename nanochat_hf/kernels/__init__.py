"""Fused kernels for training on CUDA, put in place of the model's plain formulas, which they are tested against."""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn

from . import cudnn_products, float8, float8_layers, sums
from .cudnn_attention import NAME as CUDNN
from .mlp import SquaredReluMLP, matmul

HIGHEST_CAP = 40.0  # the cross-entropy sums exp(capped logit − cap) without a maximum: float32 holds exp(−80)
HALF = torch.bfloat16, torch.float16


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


def rotation_fits(config) -> bool:
    """Whether the kernel of rotation and norm knows what models of this configuration compute."""
    return config.rope_in_bfloat16 and config.rms_norm_eps is None and config.head_dim & (config.head_dim - 1) == 0


def install(model, float8=False) -> list[str]:
    """Give a NanochatForCausalLM its fused kernels; returns the names of those that fit it now.

    Layers whose projections are not `plain` keep the formulas, and so does the attention of models with an epsilon of their own or
    unrounded cosines (imported from transformers' NanoChat), which the kernel does not know, and the loss above a cap of HIGHEST_CAP.
    `float8` takes the products of the layers in float8 where 16 divides their widths, in training alone; the last name counts them.
    """
    config, installed, layers = model.config, set(), model.model.layers
    if config.final_logit_softcapping <= HIGHEST_CAP:
        model.nll_and_slope, model.add_product = nll_and_slope, add_product
        installed.add("softcapped cross-entropy")
    by_cudnn = torch.cuda.is_available() and cudnn_products.serves(torch.device("cuda", torch.cuda.current_device()))
    by_triton = find_spec("triton") is not None  # float8 does without, for tests
    model.model.fused_mix, model.model.fused_tables = (mixed_and_normed, ordered_tables) if by_triton else (None, None)
    for layer in layers:
        layer.fused_norm = stream_and_norm if by_triton and not float8 else None  # float8 has its casts in the kernel of the norm
        layer.self_attn.fused_gate = gated_rows
        layer.self_attn.fused_whole = None if float8 else rotated_attention
        layer.self_attn.fused = float8_queries_keys_values if float8 else queries_keys_values if rotation_fits(config) else None
        layer.self_attn.fused_output = float8_output if float8 else output if by_cudnn else None
        layer.mlp.fused = float8_squared_relu if float8 else squared_relu
    if rotation_fits(config) and all(plain(layer.self_attn.q_proj, layer.self_attn.k_proj) for layer in layers):
        installed.add("rope and norm of queries and keys")
    if all(plain(layer.mlp.up_proj, layer.mlp.down_proj) for layer in layers):
        installed.add("squared ReLU")
    if by_triton:
        installed |= {"residual stream and its norms"} | ({"value embeddings' gradients"} if model.model.value_embeds else set())
    return sorted(installed) + ([float8_share(model)] if float8 else [])


def float8_share(model) -> str:
    """How many of the layers' matrices are multiplied in float8, for the plan."""
    groups = [group for layer in model.model.layers for group in (_inputs(layer.self_attn), (layer.self_attn.o_proj,), _mlp(layer.mlp))]
    count = sum(len(group) for group in groups if plain(*group) and float8.fits(*group))
    return f"float8 products of {count} of the layers' {sum(map(len, groups))} matrices, the rest and the head as autocast has them"


def kept_sums(model, wanted=True, dtype=None):
    """A context in which the kernels of `model` add the gradients of its weights up themselves, where `wanted`, and have them rounded to `dtype`: see
    sums.kept. For one process alone: several reduce what autograd hands them. And for models that are trained whole: below the first weight that is
    trained nothing has a gradient by which autograd would come to these kernels."""
    base, groups, wanted = getattr(model, "model", None), [], wanted and all(parameter.requires_grad for parameter in model.parameters())
    for layer in getattr(base, "layers", ()) if wanted else ():
        attention, mlp = layer.self_attn, layer.mlp
        if attention.fused is queries_keys_values:
            groups.append(_inputs(attention))
        if attention.fused_output is output:
            groups.append((attention.o_proj,))
        if mlp.fused is squared_relu:
            groups += [(module,) for module in _mlp(mlp)]
    if wanted and getattr(base, "fused_tables", None) is ordered_tables:
        groups += [(table,) for table in base.value_embeds.values()]
    return sums.kept([group for group in groups if all(type(module) in (nn.Linear, nn.Embedding) for module in group)], dtype)


def _inputs(attention):
    return attention.q_proj, attention.k_proj, attention.v_proj


def _mlp(mlp):
    return mlp.up_proj, mlp.down_proj


def _suits_float8(x, *modules):
    # the tokens are the inner axis of the weights' gradients
    return plain(*modules) and float8.fits(*modules) and x.shape[:-1].numel() % float8.MULTIPLE == 0


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


def mixed_and_normed(stream, update, x0, resid, skip, eps, channels):
    """resid·(stream + update) + skip·x0 (B, T, C), its RMS norm, that norm's first `channels`, and x0 for the next layer."""
    from .stream import MixAndNorm

    return MixAndNorm.apply(stream, update, x0.to(stream.device), resid, skip, _eps(eps), channels)


def stream_and_norm(x, eps):
    """x (B, T, C) and its RMS norm."""
    from .stream import StreamAndNorm

    return StreamAndNorm.apply(x, _eps(eps))


def ordered_tables(tables, ids, dtype):
    """{layer: arguments of `gated_rows` but the gate} of the tables of value embeddings, for values of `dtype`; {} where they are not lookups of whole
    tables."""
    from .value_embedding import order_of_ids

    weights = {int(layer): table.weight for layer, table in tables.items() if type(table) is nn.Embedding}
    if not weights or len(weights) < len(tables) or any(hasattr(weight, "device_mesh") for weight in weights.values()):  # FSDP2's parts
        return {}
    order = order_of_ids(ids, next(iter(weights.values())).shape[0])
    modules = {layer: tables[str(layer)] for layer in weights}
    return {layer: (*sums.weights_of([table], dtype), ids, *order, sums.of(table)) for layer, table in modules.items()}


def gated_rows(gate, weight, ids, *order_and_sum):
    """gate (B, T, K) · rows (B, T, K, D) of a table, whose gradient is summed id after id."""
    from .value_embedding import GatedRows

    return GatedRows.apply(gate, weight, ids, *order_and_sum)


def _eps(eps):
    # F.rms_norm's own is that of the dtype it computes in
    return torch.finfo(torch.float32).eps if eps is None else eps


def _one_product(attention, x):
    # whether one product makes queries, keys and values, rotated and normed
    inputs = _inputs(attention)
    fits = matmul and plain(*inputs) and rotation_fits(attention.config) and attention.head_dim <= matmul.COLUMNS // 2
    return fits and matmul.suits(x, *(size for module in inputs for size in module.weight.shape))


def rotated_attention(attention, x, gate, value_embedding, rope, borders):
    """Normed x (B, T, C), gate and value embedding or None → heads' results (B, T, H, D), where one product makes all that cuDNN's attention reads; else
    None."""
    if attention.config._attn_implementation != CUDNN or not _one_product(attention, x) or x.shape[1] < 2:
        return None
    from .projections import Attention, adds

    # rows of a table that is rounded already are added within the product
    rounded = isinstance(value_embedding, tuple) and value_embedding[0].dtype == gate.dtype
    lookup = (gate, *value_embedding) if rounded and adds(sum(_heads(attention)), attention.head_dim) else ()
    value = None if lookup else attention.gated(gate, value_embedding)
    weights = sums.weights_of(_inputs(attention), sums.computing(x))
    options = *_heads(attention), attention.scaling, attention.sliding_window or 0
    return Attention.apply(x, *weights, value, rope, borders, *options, sums.of(attention.q_proj), *lookup)


def _heads(attention):
    return attention.q_proj.out_features // attention.head_dim, attention.k_proj.out_features // attention.head_dim


def queries_keys_values(attention, x, rope):
    """What NanochatAttention.queries_keys_values computes, by one product, else by one for queries and keys, and one kernel for rotation and norm."""
    if not (plain(attention.q_proj, attention.k_proj) and rotation_fits(attention.config)):
        return attention.queries_keys_values(x, rope)
    if _one_product(attention, x):
        from .projections import QueriesKeysValues

        weights = sums.weights_of(_inputs(attention), sums.computing(x))
        return QueriesKeysValues.apply(x, *weights, rope, *_heads(attention), sums.of(attention.q_proj))
    both = F.linear(x, torch.cat((attention.q_proj.weight, attention.k_proj.weight)))
    return *_rotated(attention, both, rope), attention.v_proj(x).unflatten(-1, (-1, attention.head_dim))


def _rotated(attention, both, rope):
    from .rope import RopeNorm

    return RopeNorm.apply(both, rope, *_heads(attention))


def squared_relu(mlp, x):
    """What NanochatMLP.squared_relu computes. A function, since torch.compile does not trace a bound `apply` (docs/log.md)."""
    if not plain(mlp.up_proj, mlp.down_proj):
        return mlp.squared_relu(x)
    (up,), (down,) = (sums.weights_of([module], sums.computing(x)) for module in _mlp(mlp))
    return SquaredReluMLP.apply(x, up, down, sums.of(mlp.up_proj), sums.of(mlp.down_proj))


def float8_queries_keys_values(attention, x, rope):
    """`queries_keys_values` of normed x by float8 products, where they fit."""
    if not _suits_float8(x, *_inputs(attention)):
        return queries_keys_values(attention, x, rope)
    both, v = float8_layers.Projections.apply(x, *(module.weight for module in _inputs(attention)))
    D, queries = attention.head_dim, attention.q_proj.out_features
    if rotation_fits(attention.config):
        q, k = _rotated(attention, both, rope)
    else:
        q, k = attention.rotated(both[..., :queries].unflatten(-1, (-1, D)), both[..., queries:].unflatten(-1, (-1, D)), rope)
    return q, k, v.unflatten(-1, (-1, D))


def float8_output(attention, y, stream):
    """stream + o_proj(y), by float8 products where they fit."""
    return stream + (float8_layers.Linear.apply(y, attention.o_proj.weight) if _suits_float8(y, attention.o_proj) else attention.o_proj(y))


def output(attention, y, stream):
    """stream + o_proj(y), summed within the product where cuDNN can."""
    if plain(attention.o_proj) and y.is_cuda and y.dtype == stream.dtype in HALF and stream.shape[-1] % 8 == 0:
        (weight,) = sums.weights_of([attention.o_proj], y.dtype)
        return cudnn_products.LinearPlus.apply(y, weight, stream, sums.of(attention.o_proj))
    return stream + attention.o_proj(y)


def float8_squared_relu(mlp, x):
    """`squared_relu` of normed x by float8 products, where they fit."""
    if not _suits_float8(x, *_mlp(mlp)):
        return squared_relu(mlp, x)
    return float8_layers.SquaredReluMLP.apply(x, mlp.up_proj.weight, mlp.down_proj.weight)
