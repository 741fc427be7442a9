"""The flags of reinforcement learning, and the shared ones whose defaults it changes."""

from dataclasses import dataclass, field

from nanochat_hf.config import at_least
from nanochat_hf.generation.sampling import check_sampling
from nanochat_hf.model.policy_nanochat_hf import CLIPS
from nanochat_hf.rl.objectives import ADVANTAGES, NORMALISATIONS
from nanochat_hf.rl.rewards import GRADE

from .callbacks.evaluate import EvalConfig
from .callbacks.tasks import TaskEvalConfig
from .config import PARTS, OptimConfig
from .schedules import ScheduleConfig


@dataclass(frozen=True)
class RLConfig:
    """Which model, on which questions, and what becomes of its answers.

    A recipe (--config) may list questions as train_data, with local files, and held-out ones as eval_data.
    """

    _argument_group_name = "model, questions and rewards"

    model: str = field(metadata={"help": "folder or Hub name (org/name[@revision]) of the chat model to start from"})
    tasks: str | None = field(
        default=None, metadata={"help": "tasks whose questions are asked, with commas (default: the recipe's)"}
    )
    reward: str = field(
        default=GRADE,
        metadata={
            "help": "grade (the task's own) and functions package.module:function, with commas, each with =WEIGHT or "
            "without"
        },
    )
    reward_seconds: float = field(default=30.0, metadata={"help": "seconds that a reward of one answer may take"})
    reward_threads: int = field(default=8, metadata={"help": "rewards that are computed at a time"})
    epochs: float = field(default=1.0, metadata={"help": "passes over the questions, where --num-steps is not given"})
    questions: int = field(default=16, metadata={"help": "questions of a step, of all processes together"})
    num_samples: int = field(default=16, metadata={"help": "answers to each question"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer in tokens"})
    temperature: float = field(default=1.0, metadata={"help": "of sampling, and of the loss"})
    top_k: int = field(default=50, metadata={"help": "sample among so many tokens; 0: among all"})
    rollout_rows: int = field(default=256, metadata={"help": "answers that a process writes at a time"})
    rollout_compile: bool = field(
        default=False, metadata={"help": "write answers by a compiled step, on CUDA one graph (see docs/rl.md)"}
    )
    overlong_margin: int = field(
        default=0, metadata={"help": "last tokens of --max-new-tokens over which DAPO's penalty grows to 1; 0: none"}
    )
    mask_truncated: bool = field(
        default=False, metadata={"help": "do not train on answers that met no end within --max-new-tokens"}
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "questions", "rollout_rows", "reward_threads")
        at_least(self, 0, "overlong_margin")
        if self.num_samples < 2:
            raise ValueError(f"--num-samples {self.num_samples}: an answer is compared with others; give at least 2")
        if not self.temperature > 0:
            raise ValueError(f"--temperature {self.temperature}: greedy answers are all the same; give 1")
        if not self.reward_seconds > 0:
            raise ValueError(f"--reward-seconds {self.reward_seconds} must be above 0; 30 is the default")
        if not 0 < self.epochs < float("inf"):
            raise ValueError(f"--epochs {self.epochs} must be above 0; 0.5 is half of the questions")
        check_sampling(max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_k=self.top_k)


@dataclass(frozen=True)
class ObjectiveConfig:
    """How rewards become a gradient; docs/rl.md has the papers."""

    _argument_group_name = "objective"

    advantage: str = field(default="mean", metadata={"help": f"of an answer in its group: {', '.join(ADVANTAGES)}"})
    normalisation: str = field(
        default="tokens", metadata={"help": f"by which the sum over tokens is divided: {', '.join(NORMALISATIONS)}"}
    )
    clip: str = field(default="none", metadata={"help": f"of ratios to the old probabilities: {', '.join(CLIPS)}"})
    clip_low: float = field(default=0.2, metadata={"help": "ratios below 1 minus this are cut off"})
    clip_high: float = field(default=0.2, metadata={"help": "ratios above 1 plus this are cut off"})
    kl: float = field(default=0.0, metadata={"help": "coefficient of the KL divergence from the start; 0: none"})
    updates: int = field(default=1, metadata={"help": "optimizer steps on the same answers"})
    refills: int = field(
        default=0,
        metadata={"help": "times that questions with equally good answers are replaced in a step; 0: they stay"},
    )

    def __post_init__(self) -> None:
        for name, known in (("advantage", ADVANTAGES), ("normalisation", NORMALISATIONS), ("clip", CLIPS)):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)} is unknown; choose from {', '.join(known)}")
        at_least(self, 1, "updates")
        at_least(self, 0, "refills", "kl", "clip_high")
        if not 0 <= self.clip_low < 1:
            raise ValueError(f"--clip-low {self.clip_low} must lie from 0 to below 1; 0.2 is usual")
        if self.clip == "none" and self.updates > 1:
            raise ValueError(
                f"--updates {self.updates} with --clip none would train on old answers as if they were new; "
                "give --clip token, cispo or sequence"
            )


@dataclass(frozen=True)
class RLOptim(OptimConfig):
    """A twentieth of the rates of fine-tuning."""

    embedding_lr: float = field(default=0.2, metadata={"help": "lr of token and value embeddings (AdamW)"})
    init_lr_frac: float = field(default=0.05, metadata={"help": "factor on every lr"})


@dataclass(frozen=True)
class RLSchedule(ScheduleConfig):
    """The rates fall from the first step to the last."""

    warmdown_ratio: float = field(default=1.0, metadata={"help": "last share of the run in which lr falls to 0"})


@dataclass(frozen=True)
class RLEval(EvalConfig):
    """bpb of the reference answers says what the model forgets."""

    eval_every: int = field(default=60, metadata={"help": "steps between evaluations of bpb; 0: only at the end"})


@dataclass(frozen=True)
class RLTaskEval(TaskEvalConfig):
    """pass@k on held-out questions of the tasks that are trained."""

    task_every: int = field(
        default=60,
        metadata={"help": "steps between evaluations of tasks, also before the first and at the end; 0: none"},
    )
    task_eval: str | None = field(
        default=None, metadata={"help": "task names, with commas (default: those that are trained)"}
    )
    task_limit: int = field(default=400, metadata={"help": "held-out questions a task"})
    task_samples: int = field(
        default=8, metadata={"help": "answers to a question; 1: greedy; more: sampled, which gives pass@k"}
    )
    task_tokens: int = field(default=256, metadata={"help": "longest answer in tokens"})
    task_batch_size: int = field(default=256, metadata={"help": "answers that a process writes at once"})


_OWN = {OptimConfig: RLOptim, ScheduleConfig: RLSchedule, EvalConfig: RLEval}
RL_PARTS = tuple(_OWN.get(part, part) for part in PARTS)
