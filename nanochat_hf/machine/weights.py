"""A model's weights as whole tensors, also where FSDP2 has split them or XLA holds them."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel


def is_split(model: nn.Module) -> bool:
    """Whether FSDP2 has split the parameters among the processes."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict of `model` with whole tensors. Under FSDP2 it is a collective, and the tensors are on the CPU."""
    if not is_split(model):
        weights = model.state_dict()
        # safetensors reads storages, which XLA tensors do not have
        return {name: value.cpu() for name, value in weights.items()} if model.device.type == "xla" else weights
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return cast(dict[str, torch.Tensor], weights)


def load_whole_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Fill `model`, split by FSDP2 or not, from whole tensors that every process has read."""
    if not is_split(model):
        model.load_state_dict(weights)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True))


def for_generation(model: PreTrainedModel) -> PreTrainedModel:
    """The model to generate with: itself, or on XLA a copy on the CPU, because XLA would compile each new length."""
    if model.device.type != "xla":
        return model
    with torch.device("meta"):
        copy = type(model)(model.config)
    copy.load_state_dict(whole_weights(model), assign=True)
    return copy.eval()
