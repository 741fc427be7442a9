"""Checkpoints of the original nanochat ↔ ours."""

from .checkpoints import export_checkpoint, import_checkpoint

__all__ = ["export_checkpoint", "import_checkpoint"]
