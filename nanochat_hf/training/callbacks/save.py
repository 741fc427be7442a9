"""Checkpoints during training."""

import time

from nanochat_hf.machine.accelerator import agree
from nanochat_hf.training import checkpoint
from nanochat_hf.training.tracking import say, wandb_run_id

from .base import due


class Save:
    """A checkpoint every `every` steps, every `minutes`, at the end and whenever a stop was asked for."""

    def __init__(self, output_dir, tokenizer, settings, *, every, keep, minutes=0.0):
        self.output_dir, self.tokenizer, self.settings, self.every, self.keep = (
            output_dir,
            tokenizer,
            settings,
            every,
            keep,
        )
        self.seconds, self.last = minutes * 60, time.monotonic()

    def __call__(self, trainer, info):
        late = bool(self.seconds) and agree(trainer.accelerator, time.monotonic() - self.last >= self.seconds)
        if late or due(info.step, self.every) or info.step == trainer.num_steps or trainer.stopped:
            run = wandb_run_id(trainer.accelerator)
            folder = checkpoint.save(
                trainer, self.output_dir, self.tokenizer, self.settings, self.keep, {"wandb": run} if run else {}
            )
            self.last = time.monotonic()
            say(trainer.accelerator, f"step {info.step}: saved {folder}")
