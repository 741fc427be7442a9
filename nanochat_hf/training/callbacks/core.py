"""CORE during base training: the accuracy on in-context tasks beside the loss."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from nanochat_hf.evals.core import BUNDLE_HELP, load_bundle
from nanochat_hf.evals.core_scoring import CoreOptions, evaluate_core
from nanochat_hf.machine.accelerator import Ranks
from nanochat_hf.training.tracking import MetricsFile

from .base import Measurement, evaluating

if TYPE_CHECKING:
    from nanochat_hf.training.trainer import Trainer


@dataclass(frozen=True)
class CoreConfig:
    """When to evaluate CORE, and on what."""

    _argument_group_name = "CORE"

    core_every: int = field(default=0, metadata={"help": "steps between evaluations of CORE, also at the end; 0: none"})
    core_data: str | None = field(default=None, metadata={"help": f"for CORE: {BUNDLE_HELP}"})
    core_max_per_task: int = field(default=500, metadata={"help": "items of each CORE task"})

    def __post_init__(self) -> None:
        if self.core_every < 0:
            raise ValueError(f"--core-every {self.core_every} must be at least 0; 0 is off")
        if self.core_max_per_task < 1:
            raise ValueError(f"--core-max-per-task {self.core_max_per_task} must be at least 1")
        if self.core_every and self.core_data is None:
            raise ValueError(f"--core-every {self.core_every} needs --core-data: {BUNDLE_HELP}")

    def callbacks(self, tokenizer: PreTrainedTokenizerBase, output_dir: str | None = None) -> list["EvaluateCore"]:
        """[EvaluateCore], or [] where it is off. ValueError, before any training, where the data cannot be read."""
        if not self.core_every or self.core_data is None:
            return []
        tasks, missing = load_bundle(self.core_data, self.core_max_per_task)
        return [EvaluateCore(tasks, missing, tokenizer, self, output_dir)]


class EvaluateCore(Measurement):
    """CORE every `every` steps and at the end; each rank takes its share of the items.

    `last` is the newest CoreResult.
    """

    def __init__(
        self,
        tasks: Sequence[Any],
        missing: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        config: CoreConfig,
        output_dir: str | None = None,
    ):
        self.tasks, self.missing, self.tokenizer = tasks, missing, tokenizer
        self.every, self.limit = config.core_every, config.core_max_per_task
        self.output_dir, self.last = output_dir, None

    def measure(self, trainer: "Trainer") -> None:
        """Evaluate CORE now."""
        accelerator, step = trainer.accelerator, trainer.state.step
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
        accelerator.log(values, step=step)
        if accelerator.is_main_process and self.output_dir:
            MetricsFile(f"{self.output_dir}/metrics.jsonl").write(step=step, **values)
        accelerator.print(f"step {step}: {self.last.name} {self.last.core:.4f}")
