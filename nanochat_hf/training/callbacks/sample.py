"""Answers to fixed prompts during training."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from nanochat_hf.generation import Engine
from nanochat_hf.machine.durable import write_whole
from nanochat_hf.machine.weights import for_generation
from nanochat_hf.training.tracking import say

from .base import Measurement, evaluating

if TYPE_CHECKING:
    from nanochat_hf.training.trainer import Trainer

NEW_TOKENS = 16


class Sample(Measurement):
    """Greedy answers to fixed prompts, every `every` steps and at the end, printed and kept in samples.md.

    `prompts`: (text shown, ids) each.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[tuple[str, list[int]]],
        every: int,
        output_dir: str | None = None,
    ):
        self.tokenizer, self.prompts, self.every, self.output_dir = tokenizer, prompts, every, output_dir

    def measure(self, trainer: "Trainer") -> None:
        """Answer the prompts now."""
        with evaluating(trainer) as model:  # on every rank: split weights need all of them
            engine = Engine(for_generation(model), self.tokenizer)
            answers = engine.generate([ids for _, ids in self.prompts], max_new_tokens=NEW_TOKENS)
        lines = [f"- {text} → {row[0].text!r}" for (text, _), row in zip(self.prompts, answers, strict=True)]
        say(trainer.accelerator, f"step {trainer.state.step}: samples", *lines)
        if trainer.accelerator.is_main_process and self.output_dir:
            write_whole(Path(self.output_dir, "samples.md"), "\n".join(lines) + "\n")
