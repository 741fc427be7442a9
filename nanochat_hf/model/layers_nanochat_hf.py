"""Small parts of the layers: plain attention, linear layers that know their distribution, which layers have tables.

Letters as in modeling_nanochat_hf.py.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_nanochat_hf import NanochatConfig
from .ops_nanochat_hf import Ops

BACKOUT_INIT = 0.2
SMEAR_GATE_INIT = 0.02  # gates of smear begin uniform between 0 and this


def linear(inputs: int, outputs: int, init_scheme: str = "uniform") -> nn.Linear:
    """A linear layer without bias that knows how it is initialised."""
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.init_scheme = init_scheme  # ty: ignore[invalid-assignment]  torch declares only tensors and modules
    return layer


def initialise(module: nn.Module, config: NanochatConfig) -> None:
    """Fill the weights that a module itself owns, in place; its `init_scheme` names their distribution."""
    owner: Any = module
    if hasattr(module, "resid_lambdas"):
        _initialise_scalars(owner, config)
    elif hasattr(module, "strength"):
        init.zeros_(owner.strength)  # smear begins without an effect
    elif isinstance(module, (nn.Linear, nn.Embedding)):
        _initialise_matrix(module.weight, getattr(module, "init_scheme", "uniform"), config)


def _initialise_matrix(weight: Tensor, scheme: str, config: NanochatConfig) -> None:
    bound = (3 / config.hidden_size) ** 0.5  # uniform(−bound, bound) has the standard deviation 1/√C
    if scheme in ("uniform", "mlp"):
        bound *= config.mlp_init_scale if scheme == "mlp" else 1.0
        init.uniform_(weight, -bound, bound)
    elif scheme == "zero" or (scheme == "value gate" and not config.value_gate_init):
        init.zeros_(weight)
    elif scheme in ("value gate", "smear gate"):
        init.uniform_(weight, 0.0, SMEAR_GATE_INIT if scheme == "smear gate" else config.value_gate_init)
    else:
        init.normal_(weight, std={"embedding": config.embedding_std, "head": 0.001}[scheme])


def _initialise_scalars(model: Any, config: NanochatConfig) -> None:
    # a straight line from the first layer's value to the last one's
    for name in ("resid", "x0"):
        scalars = getattr(model, f"{name}_lambdas")
        first, last = getattr(config, f"{name}_lambda_first"), getattr(config, f"{name}_lambda_last")
        share = torch.arange(len(scalars), device=scalars.device) / max(len(scalars) - 1, 1)
        init.copy_(scalars, first + (last - first) * share)
    if config.backout:
        init.constant_(model.backout_lambda, BACKOUT_INIT)


class NanochatMLP(nn.Module):
    """C → 4C → C with relu(·)²."""

    def __init__(self, config: NanochatConfig):
        super().__init__()
        self.up_proj = linear(config.hidden_size, config.intermediate_size, "mlp")
        self.down_proj = linear(config.intermediate_size, config.hidden_size, "zero")

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        """Normed x (B, T, C) → the update (B, T, C)."""
        return ops.squared_relu_mlp(x, self.up_proj, self.down_proj)


def has_value_embedding(config: NanochatConfig, layer_idx: int) -> bool:
    """Every second layer has a table of value embeddings, counted from the last, unless the config turns them off."""
    return config.use_value_embeddings and layer_idx % 2 == (config.num_hidden_layers - 1) % 2


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention: query (B, H, T, D), key and value (B, K, S, D), as in transformers → (B, T, H, D), weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights
