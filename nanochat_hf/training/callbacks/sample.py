"""Answers to fixed prompts during training."""

from pathlib import Path

from nanochat_hf.generation import Engine
from nanochat_hf.machine.weights import for_generation
from nanochat_hf.training.tracking import say

from .base import due, evaluating


class Sample:
    """Greedy answers to fixed prompts, every `every` steps and at the end, printed and kept in samples.md."""

    def __init__(self, tokenizer, prompts, *, every, output_dir=None, max_new_tokens=16):
        """`prompts`: list of (text shown, ids)."""
        self.tokenizer, self.prompts, self.every, self.output_dir, self.max_new_tokens = (
            tokenizer,
            prompts,
            every,
            output_dir,
            max_new_tokens,
        )

    def __call__(self, trainer, info):
        if not due(info.step, self.every) and not (self.every and info.step == trainer.num_steps):
            return
        with evaluating(trainer) as model:  # on every rank: split weights need all of them
            answers = Engine(for_generation(model), self.tokenizer).generate(
                [ids for _, ids in self.prompts], max_new_tokens=self.max_new_tokens
            )
        lines = [f"- {text} → {row[0].text!r}" for (text, _), row in zip(self.prompts, answers, strict=True)]
        say(trainer.accelerator, f"step {info.step}: samples", *lines)
        if trainer.accelerator.is_main_process and self.output_dir:
            Path(self.output_dir, "samples.md").write_text("\n".join(lines) + "\n")
