"""Checkpoints during training."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from nanochat_hf.config import at_least
from nanochat_hf.machine.accelerator import agree
from nanochat_hf.training import checkpoint
from nanochat_hf.training.trackers import identities
from nanochat_hf.training.tracking import say

from .base import Callback, due

if TYPE_CHECKING:
    from nanochat_hf.training.trainer import StepInfo, Trainer


@dataclass(frozen=True)
class SaveConfig:
    """When a checkpoint is written, and how many stay."""

    _argument_group_name = "checkpoints"

    save_every: int = field(default=0, metadata={"help": "steps between checkpoints; 0: only at the end"})
    save_minutes: float = field(default=0.0, metadata={"help": "minutes between checkpoints; 0: off"})
    keep: int = field(default=2, metadata={"help": "newest checkpoints to keep; 0: all"})

    def __post_init__(self) -> None:
        at_least(self, 0, "save_every", "save_minutes", "keep")


class Save(Callback):
    """A checkpoint every `save_every` steps, every `save_minutes`, at the end and whenever a stop was asked for."""

    def __init__(
        self,
        config: SaveConfig,
        output_dir: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: dict[str, Any],
    ):
        self.config, self.output_dir, self.tokenizer, self.settings = config, output_dir, tokenizer, settings
        self.last = time.monotonic()

    def __call__(self, trainer: "Trainer", info: "StepInfo") -> None:
        """Save where it is due."""
        seconds = 60 * self.config.save_minutes
        late = bool(seconds) and agree(trainer.accelerator, time.monotonic() - self.last >= seconds)
        if late or due(info.step, self.config.save_every) or info.step == trainer.num_steps or trainer.stopped:
            trackers = identities(trainer.accelerator)
            folder = checkpoint.save(
                trainer, self.output_dir, self.tokenizer, self.settings, self.config.keep, trackers
            )
            self.last = time.monotonic()
            say(trainer.accelerator, f"step {info.step}: saved {folder}")
