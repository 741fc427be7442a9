"""Tasks during training: their accuracy by generation, ChatCORE, and with several samples pass@k."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from nanochat_hf.config import at_least
from nanochat_hf.evals.chat import (
    CHAT_CORE,
    ChatOptions,
    chat_core,
    chosen_tasks,
    evaluate_task,
    evaluation_rows,
)
from nanochat_hf.evals.sampled import SampledOptions, evaluate_sampled
from nanochat_hf.machine.weights import Twin
from nanochat_hf.tasks.base import Task
from nanochat_hf.training.tracking import MetricsFile, say

from .base import Measurement

if TYPE_CHECKING:
    from nanochat_hf.training.trainer import Trainer

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by Accelerate's names


@dataclass(frozen=True)
class TaskEvalConfig:
    """Which tasks are evaluated during training, and how often."""

    _argument_group_name = "tasks during training"

    task_every: int = field(
        default=0,
        metadata={"help": "steps between evaluations of tasks, also before the first and at the end; 0: none"},
    )
    task_eval: str | None = field(
        default=None,
        metadata={"help": "task names, with commas (default: those of the recipe's eval_data, or the six of ChatCORE)"},
    )
    task_limit: int = field(default=64, metadata={"help": "held-out questions a task"})
    task_samples: int = field(
        default=1, metadata={"help": "answers to a question; 1: greedy; more: sampled, which gives pass@k"}
    )
    task_tokens: int = field(default=512, metadata={"help": "longest answer in tokens"})
    task_batch_size: int = field(default=64, metadata={"help": "answers that a process writes at once"})

    def __post_init__(self) -> None:
        at_least(self, 0, "task_every")
        at_least(self, 1, "task_limit", "task_samples", "task_tokens", "task_batch_size")

    def callbacks(
        self, tokenizer: PreTrainedTokenizerBase, entries: Sequence[Any] = (), output_dir: str | None = None
    ) -> list["EvaluateTasks"]:
        """[EvaluateTasks], or [] where it is off. ValueError, before any training, where a task cannot be evaluated.

        `entries` are a recipe's eval_data, which name local files of tasks.
        """
        if not self.task_every:
            return []
        chosen = chosen_tasks(self.task_eval, entries)
        sampled = [task.name for task, _ in chosen if task.kind != "generative" and self.task_samples > 1]
        if sampled:
            raise ValueError(
                f"--task-samples {self.task_samples}: {sampled[0]} is answered by its likeliest letter, not by "
                "samples; leave it out of --task-eval, or give --task-samples 1"
            )
        return [
            EvaluateTasks(
                [(task, evaluation_rows(task, path, self.task_limit)) for task, path in chosen],
                tokenizer,
                self,
                output_dir,
            )
        ]


class EvaluateTasks(Measurement):
    """Accuracy of tasks every `every` steps, before the first and at the end; each rank answers its share.

    `first` and `last` are the numbers of the first and of the newest evaluation, by their names in the log.
    """

    name = "tasks"
    at_start = True

    def __init__(
        self,
        tasks: Sequence[tuple[Task, Sequence[Any]]],
        tokenizer: PreTrainedTokenizerBase,
        config: TaskEvalConfig,
        output_dir: str | None = None,
    ):
        self.tasks, self.tokenizer, self.config = tasks, tokenizer, config
        self.every, self.output_dir = config.task_every, output_dir
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far."""
        return {"first": self.first, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict."""
        self.first, self.last = dict(state["first"]), dict(state["last"])

    def measure(self, trainer: "Trainer") -> None:
        """Evaluate now; `last` is equal on all ranks."""
        accelerator, step = trainer.accelerator, trainer.state.step
        model = Twin(trainer.raw_model, DTYPES[accelerator.mixed_precision]).model
        self.last = (
            self._sampled(model, accelerator) if self.config.task_samples > 1 else self._greedy(model, accelerator)
        )
        self.first = self.first or self.last
        accelerator.log(self.last, step=step)
        if accelerator.is_main_process and self.output_dir:
            MetricsFile(f"{self.output_dir}/metrics.jsonl").write(step=step, **self.last)
        told = ", ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in self.last.items())
        say(accelerator, f"step {step}: {told}")

    def _greedy(self, model, accelerator):
        options = ChatOptions(self.config.task_batch_size, self.config.task_tokens, progress=False)
        results = [
            (evaluate_task(model, self.tokenizer, task, rows, accelerator=accelerator, options=options), task.baseline)
            for task, rows in self.tasks
        ]
        found = {f"eval/{result.name}": result.accuracy for result, _ in results}
        summary = [(result, baseline) for result, baseline in results if result.name in CHAT_CORE]
        return found | ({"eval/chatcore": chat_core(summary)} if summary else {})

    def _sampled(self, model, accelerator):
        own = self.config
        options = SampledOptions(own.task_samples, own.task_tokens, rows=own.task_batch_size)
        found = {}
        for task, rows in self.tasks:
            result = evaluate_sampled(model, self.tokenizer, task, rows, options, accelerator)
            found |= {f"eval/{result.name}/pass@{k}": result.pass_at(k) for k in result.shown}
        return found
