"""Kernels for training on CUDA, in place of the plain formulas that each of them is tested against. See README.md."""

from .dispatch import choose, registered, summed, table
from .lib.cudnn_attention import register
from .lib.devices import FLOAT8, available

__all__ = ["FLOAT8", "available", "choose", "registered", "summed", "table"]

register()  # makes the attention implementation "cudnn" known to transformers
