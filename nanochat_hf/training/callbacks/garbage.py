"""Python's garbage, collected between steps."""

import gc
from typing import TYPE_CHECKING

from .base import Callback, due

if TYPE_CHECKING:
    from nanochat_hf.training.trainer import StepInfo, Trainer


class CollectGarbage(Callback):
    """Stops Python's own collections, which pause a step at random, and collects every `every` steps.

    The reference found it useful.
    """

    def __init__(self, every: int = 5000):
        self.every = every
        gc.collect()
        gc.freeze()
        gc.disable()

    def __call__(self, trainer: "Trainer", info: "StepInfo") -> None:
        """Collect where it is due; after the last step Python collects by itself again."""
        if due(info.step, self.every):
            gc.collect()
        if info.step == trainer.num_steps or trainer.stopped:
            gc.enable()
            gc.unfreeze()
