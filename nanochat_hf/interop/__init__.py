"""Checkpoints of the original nanochat ↔ ours."""

from .checkpoints import Decisions, export_checkpoint, import_checkpoint

__all__ = ["Decisions", "export_checkpoint", "import_checkpoint"]
