"""A product that is added to a float32 sum before it is rounded to half precision."""

import torch
from torch import Tensor

from nanochat_hf.model.configuration_nanochat_hf import NanochatConfig

from ..lib.devices import HALF
from ..lib.weights import add_product_

OP = "add_product"
INTERPRETED = False  # torch has this product only on CUDA


def fits(config: NanochatConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """None on a GPU."""
    return None if device.type == "cuda" else f"no such product on {device.type}"


def serves(total: Tensor, a: Tensor, b: Tensor) -> bool:
    """For half precision."""
    return a.is_cuda and a.dtype in HALF


def run(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (n, m) float32 += a (n, k) · b (k, m)."""
    add_product_(total, a, b)
