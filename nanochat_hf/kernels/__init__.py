"""Kernels for training on CUDA. Each replaces a plain formula and is tested against it. See README.md."""

from .dispatch import choose, registered, summed, table
from .lib.cudnn_attention import register
from .lib.devices import FLOAT8, available

__all__ = ["FLOAT8", "available", "choose", "registered", "summed", "table"]

register()  # so that transformers knows the attention implementation "cudnn"
