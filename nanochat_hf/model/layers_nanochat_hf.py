"""Small parts of the layers: plain attention, linear layers that know their distribution, which layers have tables.

Letters as in modeling_nanochat_hf.py.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_nanochat_hf import NanochatConfig


def linear(inputs: int, outputs: int, init_scheme: str = "uniform") -> nn.Linear:
    """A linear layer without bias that knows how it is initialised."""
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.init_scheme = init_scheme  # ty: ignore[invalid-assignment]  torch declares only tensors and modules
    return layer


def initialise(weight: Tensor, scheme: str, bound: float) -> None:
    """Fill a weight in place: uniform(−bound, bound), zero, or normal of deviation 1 (unit) or 0.001 (head)."""
    if scheme == "uniform":
        init.uniform_(weight, -bound, bound)
    elif scheme == "zero":
        init.zeros_(weight)
    else:
        init.normal_(weight, std={"unit": 1.0, "head": 0.001}[scheme])


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
