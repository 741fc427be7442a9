"""CORE during base training: the accuracy on in-context tasks beside the loss."""

from dataclasses import dataclass, field

from nanochat_hf.evals.core import BUNDLE_HELP, load_bundle
from nanochat_hf.evals.core_scoring import CoreOptions, evaluate_core
from nanochat_hf.machine.accelerator import Ranks
from nanochat_hf.training.tracking import MetricsFile

from .base import due, evaluating


@dataclass(frozen=True)
class CoreConfig:
    """When to evaluate CORE, and on what."""

    core_every: int = field(default=0, metadata={"help": "steps between evaluations of CORE, also at the end; 0: none"})
    core_data: str | None = field(default=None, metadata={"help": f"for CORE: {BUNDLE_HELP}"})
    core_max_per_task: int = field(default=500, metadata={"help": "items of each CORE task"})

    def __post_init__(self):
        if self.core_every < 0:
            raise ValueError(f"--core-every {self.core_every} must be at least 0; 0 is off")
        if self.core_max_per_task < 1:
            raise ValueError(f"--core-max-per-task {self.core_max_per_task} must be at least 1")
        if self.core_every and self.core_data is None:
            raise ValueError(f"--core-every {self.core_every} needs --core-data: {BUNDLE_HELP}")

    def callbacks(self, tokenizer, output_dir=None):
        """[EvaluateCore], or [] where it is off; ValueError, before any training, where the data cannot be read."""
        if not self.core_every:
            return []
        tasks, missing = load_bundle(self.core_data, self.core_max_per_task)
        return [
            EvaluateCore(
                tasks, missing, tokenizer, every=self.core_every, limit=self.core_max_per_task, output_dir=output_dir
            )
        ]


class EvaluateCore:
    """CORE every `every` steps and at the end; each rank takes its share of the items. `last` is the newest CoreResult."""

    def __init__(self, tasks, missing, tokenizer, *, every, limit=None, output_dir=None):
        self.tasks, self.missing, self.tokenizer, self.every, self.limit = tasks, missing, tokenizer, every, limit
        self.output_dir, self.last = output_dir, None

    def __call__(self, trainer, info):
        if not due(info.step, self.every) and info.step != trainer.num_steps:
            return
        accelerator = trainer.accelerator
        with evaluating(trainer) as model:
            self.last = evaluate_core(
                model,
                self.tokenizer,
                self.tasks,
                self.missing,
                options=CoreOptions(limit=self.limit, progress=False),
                ranks=Ranks.of(accelerator),
            )
        values = {"core/core": self.last.core} | {f"core/{row['task']}": row["centred"] for row in self.last.rows}
        accelerator.log(values, step=info.step)
        if accelerator.is_main_process:
            MetricsFile(f"{self.output_dir}/metrics.jsonl" if self.output_dir else None).write(step=info.step, **values)
        accelerator.print(f"step {info.step}: {self.last.name} {self.last.core:.4f}")
