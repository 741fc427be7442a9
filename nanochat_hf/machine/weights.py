"""A model's weights as whole tensors, however FSDP2 or XLA hold them."""

import torch


def whole_weights(model):
    """The state dict of `model` with whole tensors, on every rank that will write; a collective under FSDP2."""
    if not any(hasattr(p, "full_tensor") for p in model.parameters()):
        weights = model.state_dict()
        # safetensors reads storages, which XLA tensors do not have
        return {name: value.cpu() for name, value in weights.items()} if model.device.type == "xla" else weights
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_whole_weights(model, weights):
    """Fill `model`, split by FSDP2 or not, from whole tensors that every rank has read."""
    if not any(hasattr(p, "full_tensor") for p in model.parameters()):
        model.load_state_dict(weights)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))


def for_generation(model):
    """The model itself; on XLA a copy on the host, for each new length would be compiled anew there."""
    if model.device.type != "xla":
        return model
    with torch.device("meta"):
        copy = type(model)(model.config)
    copy.load_state_dict(whole_weights(model), assign=True)
    return copy.eval()
