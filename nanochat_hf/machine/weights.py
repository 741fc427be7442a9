"""A model's weights as whole tensors, also where FSDP2 has split them or XLA holds them; a second model of them."""

import copy
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


def _whole(value: torch.Tensor) -> torch.Tensor:
    # one by one and on every process, unlike `whole_weights`, which gives the first process alone a split model's
    gathered = getattr(value, "full_tensor", None)
    return (value if gathered is None else gathered()).detach()


class Twin:
    """A second model with the weights of one that is trained: plain, whole, in `dtype`, ready to generate with.

    The trained one may meanwhile be compiled, wrapped, split among processes, or have kernels and an attention of its
    own. Weights that have the right dtype and device are shared, others are copied by `refresh`, always to the same
    addresses. On XLA the twin lies on the CPU, because XLA would compile each new length.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        config = copy.deepcopy(model.config)
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            self.model: PreTrainedModel = type(model)(config)
        self.trained, self.dtype = model, dtype
        self.device = torch.device("cpu") if model.device.type == "xla" else model.device
        self.model.load_state_dict(self._weights(), assign=True)
        self.model.requires_grad_(False).eval()

    def _weights(self) -> dict[str, torch.Tensor]:
        kept = tuple(getattr(self.trained, "_keep_in_fp32_modules_strict", None) or ())
        return {
            name: _whole(value).to(self.device, torch.float32 if name.endswith(kept) else self.dtype)
            for name, value in self.trained.state_dict().items()
        }

    @torch.no_grad()
    def refresh(self) -> PreTrainedModel:
        """The model with the present weights. A collective where they are split."""
        own = self.model.state_dict()
        for name, value in self._weights().items():
            if value.data_ptr() != own[name].data_ptr():
                own[name].copy_(value)
        return self.model
