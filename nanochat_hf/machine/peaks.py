"""What a device can do: FLOP/s and memory."""

import torch

from nanochat_hf.scaling import peak_of


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of the device by its name, or None if it is unknown; then no MFU is printed."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def device_memory(device: torch.device) -> float:
    """GiB of a CUDA device."""
    return torch.cuda.get_device_properties(device).total_memory / 2**30
