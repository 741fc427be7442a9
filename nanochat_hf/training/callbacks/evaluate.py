"""Bits per byte on validation data during training."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from nanochat_hf.config import at_least
from nanochat_hf.evals.bpb import evaluate_bpb
from nanochat_hf.machine.accelerator import agree, sum_over_ranks
from nanochat_hf.machine.xla import step_by_step
from nanochat_hf.training.exporting import export_model
from nanochat_hf.training.tracking import MetricsFile, say

from .base import Measurement, evaluating

if TYPE_CHECKING:
    from nanochat_hf.training.trainer import Trainer

EVAL_TOKENS = 8192  # positions whose float32 logits an evaluation holds at a time: 1 GiB at 32,768 tokens of vocabulary
WORSE = 1.02  # times the minimum, from where a run is told that it may be diverging
NOTE = ".validation.json"  # in best/: the step and the bpb of the model there


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
    ema: float = field(
        default=0.0,
        metadata={
            "help": "average the weights over the last steps, with so much decay a step (0.99 looks back 100 steps); "
            "evaluated at the end, and exported if it is better; 0: off"
        },
    )
    ema_share: float = field(default=0.2, metadata={"help": "last share of the run over which --ema averages"})
    sample_every: int = field(default=0, metadata={"help": "steps between answers to fixed prompts; 0: none"})

    def __post_init__(self) -> None:
        at_least(self, 1, "eval_batches")
        at_least(self, 0, "eval_every", "sample_every")
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema {self.ema} must lie from 0, which is off, to below 1; 0.99 looks back 100 steps")
        if not 0 < self.ema_share <= 1:
            raise ValueError(f"--ema-share {self.ema_share} must be above 0 and at most 1; 0.2 is the last fifth")


def divided(batches: list[dict], rank: int, world_size: int) -> list[dict]:
    """The share of one process in validation batches that all of them have made.

    What they measure together must not depend on how many there are. Each process gets as many rows, since evaluating a
    split model is a collective. Where the rows do not divide, some processes get a row without a target.
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


def pieces(batches: Iterable[dict[str, torch.Tensor]], tokens: int = EVAL_TOKENS) -> Iterator[dict[str, torch.Tensor]]:
    """The same rows in batches of at most `tokens` positions (one row at least)."""
    for batch in batches:
        rows = max(1, tokens // batch["input_ids"].shape[1])
        for start in range(0, len(batch["input_ids"]), rows):
            yield {key: value[start : start + rows] for key, value in batch.items()}


class Evaluate(Measurement):
    """Bits per byte on fixed validation batches, on the cadence and at the end.

    Keeps the minimum, and its model in best/.

    `best` is the minimum of this run so far. `kept` is that of the model in best/, which a killed run may have written
    after the checkpoint from which the next one goes on; so `minimum`, what is reported, is always that of the model
    there.
    """

    name = "evaluate"

    def __init__(
        self,
        config: EvalConfig,
        batches: Sequence[dict[str, torch.Tensor]],
        token_bytes: torch.Tensor,
        tokenizer: PreTrainedTokenizerBase,
        output_dir: str | None = None,
    ):
        self.batches, self.token_bytes, self.tokenizer = batches, token_bytes, tokenizer
        self.every, self.at_start, self.output_dir = config.eval_every, bool(config.eval_every), output_dir
        self.best_dir = Path(output_dir, "best") if output_dir and config.keep_best else None
        self.best, self.last, self.kept = math.inf, math.nan, math.inf
        self.first: float | None = None

    @property
    def minimum(self) -> float:
        """The lowest bpb, and where a best model is kept that of this model."""
        return min(self.best, self.kept)

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far."""
        return {"best": self.best, "last": self.last, "first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict, with the model that is in best/ now."""
        first = None if state["first"] is None else float(state["first"])
        self.best, self.last, self.first = float(state["best"]), float(state["last"]), first
        if self.best_dir:
            self.kept = kept_bpb(self.best_dir)
            if self.kept > self.best:  # best/ was not kept then, or is gone: the next minimum comes from here on
                self.best = self.kept

    def measure(self, trainer: "Trainer") -> None:
        """Evaluate now; `last` is then the bpb, equal on all ranks."""
        accelerator, step = trainer.accelerator, trainer.state.step
        self.last = self.bpb(trainer)
        self.first = self.last if self.first is None else self.first
        if self.last > WORSE * self.best:
            rose = f"validation rose to {self.last:.4f} bpb from {self.best:.4f}; the run may be diverging"
            say(accelerator, f"warning: step {step}: {rose}")
        accelerator.log({"val/bpb": self.last}, step=step)
        if accelerator.is_main_process and self.output_dir:
            MetricsFile(f"{self.output_dir}/metrics.jsonl").write(step=step, **{"val/bpb": self.last})
        say(accelerator, f"step {step}: validation {self.last:.4f} bpb")
        self._keep(trainer, step)
        self.best = min(self.best, self.last)

    def bpb(self, trainer: "Trainer") -> float:
        """Bits per byte of the model as it is, equal on all ranks."""
        with evaluating(trainer) as model:
            batches = step_by_step(model.device, pieces(self.batches))
            return evaluate_bpb(model, batches, self.token_bytes, reduce=sum_over_ranks(trainer.accelerator))

    def _keep(self, trainer, step):
        # the main process decides: another could have read best/ at another moment
        main = trainer.accelerator.is_main_process
        if not self.best_dir or not agree(trainer.accelerator, main and self.last < self.minimum):
            return
        note = {NOTE: json.dumps({"step": step, "val/bpb": self.last})}
        export_model(trainer, self.tokenizer, self.best_dir, note)
        self.kept = self.last


def kept_bpb(best_dir: Path) -> float:
    """Bits per byte of the model in `best_dir`, as its note says; infinity where there is none."""
    try:
        return float(json.loads((best_dir / NOTE).read_text())["val/bpb"])
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf
