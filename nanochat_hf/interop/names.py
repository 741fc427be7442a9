"""Names, dtypes and rows of the weights of nanochat ↔ ours. The architectures are the same."""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..model import NanochatConfig, NanochatForCausalLM

OLD_LAMBDAS = {"resid_lambdas": 1.0, "x0_lambdas": 0.0}
MATRICES = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "attn.ve_gate": "self_attn.ve_gate",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
SINGLE = {  # theirs: ours
    "transformer.wte.weight": "model.embed_tokens.weight",
    "smear_gate.weight": "model.smear.gate.weight",
    "smear_lambda": "model.smear.strength",
}
Weights = dict[str, torch.Tensor]


def name_to_nanochat(name: str) -> str:
    """The name of any parameter of ours → nanochat's.

    >>> name_to_nanochat("model.layers.3.mlp.up_proj.weight")
    'transformer.h.3.mlp.c_fc.weight'
    """
    single = next((theirs for theirs, ours in SINGLE.items() if ours == name), None)
    if single:
        return single
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if layer:
        theirs = {ours: theirs for theirs, ours in MATRICES.items()}[layer[2]]
        return f"transformer.h.{layer[1]}.{theirs}.weight"
    return name.removeprefix("model.")


def weights_from_nanochat(weights: Mapping[str, Any], config: NanochatConfig) -> Weights:
    """A state dict of nanochat, without `_orig_mod.` prefixes → ours, in float32.

    Where it has no lambdas they get the values that change nothing.

    Raises ValueError, with the name, for a tensor that is missing, unknown, of another shape, or not floating point.
    """
    weights = dict(weights)
    for name, value in OLD_LAMBDAS.items():
        weights.setdefault(name, torch.full((config.num_hidden_layers,), value))
    names = {name_to_nanochat(name): (name, value.shape) for name, value in empty_model(config).state_dict().items()}
    missing, unknown = sorted(names.keys() - weights.keys()), sorted(weights.keys() - names.keys())
    if missing or unknown:
        kind, listed = ("lacks", missing) if missing else ("has the unknown", unknown)
        raise ValueError(
            f"the checkpoint {kind} {listed[0]} ({len(listed)} such tensors); its model_config does not describe it"
        )
    for theirs, (_, shape) in names.items():
        value = weights[theirs]
        if not torch.is_tensor(value) or not value.is_floating_point():
            held = getattr(value, "dtype", type(value).__name__)
            raise ValueError(f"{theirs} holds {held}; weights must be floating point numbers")
        if value.shape != shape:
            raise ValueError(f"{theirs} has shape {tuple(value.shape)}, model_config asks for {tuple(shape)}")
    return {ours: weights[theirs].float().contiguous() for theirs, (ours, _) in names.items()}


def weights_to_nanochat(weights: Weights, dtypes: Mapping[str, torch.dtype], rows: int) -> Weights:
    """Our state dict → nanochat's.

    `dtypes` maps names of nanochat's to a dtype; the other tensors become float32. Tables of the vocabulary get `rows`
    rows, of which the added ones are zero.
    """
    named = {name_to_nanochat(name): value.detach().cpu() for name, value in weights.items()}
    for name in filter(is_table, named):
        named[name] = F.pad(named[name], (0, 0, 0, rows - len(named[name])))
    return {name: value.to(dtypes.get(name, torch.float32)).contiguous() for name, value in named.items()}


def is_table(name: str) -> bool:
    """Whether a name of nanochat's is that of a table with a row for each token."""
    return name in ("transformer.wte.weight", "lm_head.weight") or name.startswith("value_embeds.")


def empty_model(config: NanochatConfig) -> NanochatForCausalLM:
    """The model of `config` on the meta device."""
    with torch.device("meta"):  # no memory, and no time spent on random numbers
        return NanochatForCausalLM(config)
