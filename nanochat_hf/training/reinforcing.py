"""What reinforcement learning adds to a run: the questions, and the model's own answers as batches."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerFast

from nanochat_hf.data.planned import SFTBatches
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.machine.accelerator import process_count
from nanochat_hf.model import NanochatForCausalLM
from nanochat_hf.model.policy_nanochat_hf import Policy
from nanochat_hf.rl.answers import Sampling, Writer
from nanochat_hf.rl.questions import Questions
from nanochat_hf.rl.rewards import Grader, parse_rewards
from nanochat_hf.rl.rollouts import Models, Objective, RolloutBatches, Setup
from nanochat_hf.rl.rows import Shape, needed_accumulation

from .callbacks.evaluate import divided
from .callbacks.tasks import DTYPES
from .config import TrainConfig
from .rl_flags import ObjectiveConfig, RLConfig

HELD_OUT = 200  # questions of each task whose reference answers validate the run


@dataclass(frozen=True)
class RLRun:
    """All flags of a run; ValueError where they do not go together."""

    rl: RLConfig
    objective: ObjectiveConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        run = self.train.run
        if self.rl.max_new_tokens + 2 > run.max_seq_len:
            raise ValueError(
                f"--max-new-tokens {self.rl.max_new_tokens} does not fit rows of --max-seq-len {run.max_seq_len} "
                "together with a question; raise --max-seq-len"
            )

    @classmethod
    def of(cls, rl: RLConfig, objective: ObjectiveConfig, train: TrainConfig) -> "RLRun":
        """From the flags as they were given: two questions and two short answers each where a smoke test is wanted."""
        if train.run.total_batch_size is not None:
            raise ValueError(
                f"--total-batch-size {train.run.total_batch_size}: a step takes the answers to --questions × "
                "--num-samples, whatever their tokens; leave it out"
            )
        if train.run.smoke_test:
            few = min(rl.max_new_tokens, 16)
            rl = replace(rl, questions=2, num_samples=2, max_new_tokens=few, overlong_margin=0)
        return cls(rl, objective, train)

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt that still fits a row with the longest answer."""
        return self.train.run.max_seq_len - self.rl.max_new_tokens

    def for_prompts(self, longest: int) -> "RLRun":
        """With as many micro-batches as hold the answers of a step, however long; `longest` prompt in tokens."""
        rows, positions, processes = self.train.run.device_batch_size, self.train.run.max_seq_len, process_count()
        answers = self.rl.questions * self.rl.num_samples
        accumulation = needed_accumulation(answers, longest + self.rl.max_new_tokens, positions, rows, processes)
        run = replace(self.train.run, total_batch_size=accumulation * rows * positions * processes)
        return replace(self, train=replace(self.train, run=run))

    def steps(self, questions: int) -> int:
        """Steps of the run: --num-steps, else --epochs over the questions, as many as are whole."""
        if self.train.run.num_steps:
            return self.train.run.num_steps
        return max(1, int(self.rl.epochs * questions // self.rl.questions)) * self.objective.updates

    @property
    def policy(self) -> Policy:
        """What the model's loss is told."""
        own = self.objective
        return Policy(own.clip, own.clip_low, own.clip_high, self.rl.temperature)

    def setup(self, accelerator: Accelerator, pad: int) -> Setup:
        """How answers are drawn, what they become, and the shape of batches."""
        rl, own, run = self.rl, self.objective, self.train.run
        return Setup(
            Objective(
                rl.questions,
                own.advantage,
                own.normalisation,
                self.policy,
                own.kl,
                own.updates,
                own.refills,
                rl.mask_truncated,
            ),
            Sampling(
                rl.num_samples,
                rl.max_new_tokens,
                rl.temperature,
                rl.top_k or None,
                rl.rollout_rows,
                rl.overlong_margin,
            ),
            Shape(
                run.device_batch_size,
                run.max_seq_len,
                accelerator.gradient_accumulation_steps,
                accelerator.process_index,
                accelerator.num_processes,
                fixed=accelerator.device.type == "xla",
            ),
            pad,
        )

    def settings(self, sources: Sequence[SourceConfig]) -> dict[str, Any]:
        """For config.json."""
        own = asdict(self.rl) | asdict(self.objective)
        return own | {"train_data": [asdict(source) for source in sources]}

    def lines(self, questions: Questions) -> dict[str, str]:
        """What the plan says of questions, answers and objective."""
        rl, own, steps = self.rl, self.objective, self.steps(len(questions))
        passes = steps / own.updates * rl.questions / len(questions)
        lines = {
            "questions": f"{len(questions):,}, prompts of up to {questions.longest} tokens; "
            f"{passes:.2f} passes in {steps:,} steps",
            "answers": f"{rl.questions} questions × {rl.num_samples} of up to {rl.max_new_tokens} tokens a step, "
            f"temperature {rl.temperature:g}, top-k {rl.top_k or 'all'}",
            "reward": rl.reward,
            "objective": f"advantage {own.advantage}, normalisation {own.normalisation}, clip {own.clip}, "
            f"KL {own.kl:g}, updates {own.updates}, refills {own.refills}",
            "start": rl.model,
        }
        return lines | ({"left out": questions.report.left_out} if questions.report.left_out else {})


def sources_of(rl: RLConfig, entries: Sequence[Any] | None) -> list[SourceConfig]:
    """From --tasks, else from the recipe's train_data; ValueError where nothing is named, or has no grade."""
    if rl.tasks:
        sources = [SourceConfig(task=name.strip()) for name in rl.tasks.split(",")]
    else:
        sources = SourceConfig.from_recipe_list(entries, "train_data")
    if not sources:
        raise ValueError("no questions; give --tasks, such as gsm8k, or a recipe with train_data")
    graded = any(reward.function is None for reward in parse_rewards(rl.reward))
    for source in sources:
        if source.weight is not None:
            raise ValueError(
                f"{source.label}: weight={source.weight} has no meaning for questions; give repeat or rows"
            )
        if source.task is None and graded:
            raise ValueError(
                f"{source.label}: conversations of no task have no grade; give --reward package.module:function"
            )
    return sources


def held_out_tasks(sources: Sequence[SourceConfig]) -> list[dict[str, str]]:
    """The tasks whose held-out questions are known without a file, as entries of eval_data."""
    names = dict.fromkeys(source.task for source in sources if source.task and source.path is None)
    return [{"task": name} for name in names]


def rollouts(
    flags: RLRun,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerFast,
    model: NanochatForCausalLM,
    questions: Questions,
) -> RolloutBatches:
    """The model's own answers as batches."""
    if accelerator.device.type == "xla" and accelerator.num_processes > 1:
        raise ValueError("several XLA processes cannot tell each other their answers; run on one process")
    model.policy = flags.policy
    setup = flags.setup(accelerator, tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0)
    writer = Writer(
        model,
        tokenizer,
        setup.sampling,
        questions.longest,
        dtype=DTYPES[accelerator.mixed_precision],
        compile=flags.rl.rollout_compile,
    )
    start = copy.deepcopy(model).requires_grad_(False).to(accelerator.device) if flags.objective.kl else None
    grader = Grader(parse_rewards(flags.rl.reward), flags.rl.reward_seconds, flags.rl.reward_threads)
    return RolloutBatches(questions, Models(model, writer, start), grader, accelerator, setup)


def reference_answers(
    config: TrainConfig, accelerator: Accelerator, tokenizer: PreTrainedTokenizerFast, sources: Sequence[SourceConfig]
) -> list[dict]:
    """Reference answers to held-out questions (of data without a test split: to the training questions), as batches."""
    chosen = [
        replace(source, split="test", start=0, rows=HELD_OUT, repeat=1)
        if source.task and source.path is None
        else replace(source, rows=min(source.rows or HELD_OUT, HELD_OUT), repeat=1)
        for source in sources
    ]
    held_out = SFTBatches(
        chosen,
        tokenizer,
        rows=config.run.device_batch_size,
        positions=config.run.max_seq_len,
        seed=config.run.seed + 1,
        prefetch=0,
    )
    batches = held_out.once(config.evaluate.eval_batches)
    return divided(batches, accelerator.process_index, accelerator.num_processes)
