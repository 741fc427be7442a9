"""Python's garbage, collected between steps."""

from .base import due


class CollectGarbage:
    """Stops Python's own collections, which pause a step at random, and collects every `every` steps; the reference found it useful."""

    def __init__(self, every=5000):
        import gc

        self.gc, self.every = gc, every
        gc.collect()
        gc.freeze()
        gc.disable()

    def __call__(self, trainer, info):
        if due(info.step, self.every):
            self.gc.collect()
        if info.step == trainer.num_steps or trainer.stopped:
            self.gc.enable()
            self.gc.unfreeze()
