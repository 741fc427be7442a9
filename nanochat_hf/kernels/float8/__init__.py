"""Float8 products in training: which devices and sizes can use them. See products.py for how they compute."""

import torch

from ..lib.devices import FLOAT8

MULTIPLE = 16  # float8 products need rows whose length 16 divides


def capable(device: torch.device) -> tuple[bool, str]:
    """Whether `device` has float8 products, and the reason."""
    if device.type != "cuda":
        return False, f"{device.type} has no float8 products"
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return (major, minor) >= (8, 9), f"{name} has compute capability {major}.{minor}, float8 begins with 8.9"


def lacks(device: torch.device, dtype: torch.dtype, *sides: int) -> str | None:
    """Why matrices with these sides are not multiplied in float8; None where they are."""
    if dtype != FLOAT8:
        return "float8 is not asked for"
    able, reason = capable(device)
    odd = [side for side in sides if side % MULTIPLE]
    return reason if not able else f"{MULTIPLE} does not divide {odd[0]}" if odd else None


def takes(x: torch.Tensor) -> bool:
    """Whether 16 divides the number of tokens of x (…, C), the inner axis of the product for the weights' gradients."""
    return x.shape[:-1].numel() % MULTIPLE == 0  # ty: ignore[missing-attribute]  part of a torch.Size is one too
