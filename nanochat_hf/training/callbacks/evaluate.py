"""Bits per byte on validation data during training."""

from dataclasses import dataclass, field

import torch

from nanochat_hf.config import at_least
from nanochat_hf.evals.bpb import evaluate_bpb
from nanochat_hf.interop.folder import export
from nanochat_hf.machine.accelerator import agree, sum_over_ranks
from nanochat_hf.machine.weights import whole_weights
from nanochat_hf.machine.xla import step_by_step
from nanochat_hf.training.tracking import MetricsFile, say

from .base import due, evaluating

EVAL_TOKENS = 8192  # positions whose float32 logits an evaluation holds at a time: 1 GiB at 32,768 tokens of vocabulary


@dataclass(frozen=True)
class EvalConfig:
    """What is measured during training, and how often."""

    _argument_group_name = "evaluation"

    eval_every: int = field(default=150, metadata={"help": "steps between evaluations of bpb; 0: only at the end"})
    eval_batches: int = field(
        default=8,
        metadata={
            "help": "micro-batches of validation data: of each process in base training, of all of them together "
            "in fine-tuning, where no row counts twice"
        },
    )
    keep_best: bool = field(
        default=False, metadata={"help": "export the model of the lowest validation bpb to OUTPUT_DIR/best"}
    )
    sample_every: int = field(default=0, metadata={"help": "steps between answers to fixed prompts; 0: none"})

    def __post_init__(self) -> None:
        at_least(self, 1, "eval_batches")
        at_least(self, 0, "eval_every", "sample_every")


def divided(batches: list[dict], rank: int, world_size: int) -> list[dict]:
    """The share of one process in validation batches that all of them have made: the sum must not depend on how many there are.

    Each process gets as many rows, since evaluating a split model is a collective. Where the rows do not divide, some processes get a
    row without a target.
    """
    keys = [key for key in batches[0] if all(key in batch for batch in batches)]  # loss_weights may stand in some alone
    rows = {key: torch.cat([batch[key] for batch in batches]) for key in keys}
    missing = -len(rows["input_ids"]) % world_size
    if missing:
        rows = {key: torch.cat((value, value[:1].expand(missing, -1))) for key, value in rows.items()}
        rows["shift_labels"][-missing:] = -100
    own = {key: value[rank::world_size] for key, value in rows.items()}
    size = len(batches[0]["input_ids"])
    return [
        {key: value[start : start + size] for key, value in own.items()}
        for start in range(0, len(own["input_ids"]), size)
    ]


def pieces(batches, tokens=EVAL_TOKENS):
    """The same rows in batches of at most `tokens` positions (one row at least)."""
    for batch in batches:
        rows = max(1, tokens // batch["input_ids"].shape[1])
        for start in range(0, len(batch["input_ids"]), rows):
            yield {key: value[start : start + rows] for key, value in batch.items()}


class Evaluate:
    """Bits per byte on fixed validation batches, on the cadence and at the end; keeps the minimum, and its model in best/."""

    def __init__(self, config, batches, token_bytes, tokenizer, output_dir=None):
        self.batches, self.token_bytes, self.tokenizer = batches, token_bytes, tokenizer
        self.every, self.output_dir = config.eval_every, output_dir
        self.best_dir = f"{output_dir}/best" if output_dir and config.keep_best else None
        self.best, self.last, self.first = float("inf"), float("nan"), None

    def remember(self, entries):
        """Take over what a resumed run measured before: its entries of metrics.jsonl, as read_metrics gives them. The main process's count."""
        values = [entry["val/bpb"] for entry in entries if "val/bpb" in entry]
        if values:
            self.first, self.best = values[0], min(values)

    def run(self, trainer):
        """Evaluate now; returns bpb, equal on all ranks."""
        with evaluating(trainer) as model:
            batches = step_by_step(model.device, pieces(self.batches))
            self.last = evaluate_bpb(model, batches, self.token_bytes, reduce=sum_over_ranks(trainer.accelerator))
        self.first = self.last if self.first is None else self.first
        accelerator, step = trainer.accelerator, trainer.state.step
        if self.last > 1.02 * self.best:
            say(
                accelerator,
                f"warning: step {step}: validation rose to {self.last:.4f} bpb from {self.best:.4f}; the run may be diverging",
            )
        better, self.best = self.last < self.best, min(self.best, self.last)
        accelerator.log({"val/bpb": self.last}, step=step)
        if accelerator.is_main_process:
            MetricsFile(f"{self.output_dir}/metrics.jsonl" if self.output_dir else None).write(
                step=step, **{"val/bpb": self.last}
            )
        say(accelerator, f"step {step}: validation {self.last:.4f} bpb")
        # only the main process knows what was measured before a resume, and gathering split weights needs all of them
        if self.best_dir and agree(accelerator, better and accelerator.is_main_process) and step:
            weights = whole_weights(trainer.raw_model)
            if accelerator.is_main_process:
                export(trainer.raw_model, self.tokenizer, self.best_dir, weights)
        return self.last

    def __call__(self, trainer, info):
        if due(info.step, self.every) or info.step == trainer.num_steps:
            self.run(trainer)
