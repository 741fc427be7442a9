"""What callbacks share. Each is called with (trainer, StepInfo) after every step, and owns its cadence."""

import contextlib

import torch


def due(step, every):
    """True when `step` is on the cadence `every` (0: never)."""
    return bool(every) and step % every == 0


@contextlib.contextmanager
def evaluating(trainer):
    """The raw model in evaluation mode, uncompiled, with an attention that takes any shape; afterwards as it was."""
    model, kernel = trainer.raw_model, trainer.raw_model.config._attn_implementation
    model.eval()
    if kernel not in ("eager", "sdpa"):
        model.set_attn_implementation("sdpa")
    try:
        with trainer.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            yield model
    finally:
        model.set_attn_implementation(kernel)
        model.train()
