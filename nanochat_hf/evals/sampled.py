"""Accuracy of sampled answers: pass@k, the chance that one of k answers to a question is right."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import comb
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation import Continuous, Request
from ..tasks.base import Task
from .chat import prompt_ids


@dataclass(frozen=True)
class SampledOptions:
    """How answers are sampled: so many to a question, of so many tokens at most; `rows` at a time."""

    samples: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = 50
    seed: int = 42
    rows: int = 256


@dataclass(frozen=True)
class SampledResult:
    """`right[i]` of the `samples` answers to question i are right."""

    name: str
    samples: int
    right: tuple[int, ...]

    def pass_at(self, k: int) -> float:
        """pass@k over the questions."""
        return sum(self._each(k)) / len(self.right)

    def stderr(self, k: int) -> float:
        """Standard error of pass@k, from the spread over the questions; 0 for a single one."""
        each, mean, count = self._each(k), self.pass_at(k), len(self.right)
        return (sum((value - mean) ** 2 for value in each) / max(1, count - 1) / count) ** 0.5

    def _each(self, k: int) -> list[float]:
        return [pass_at_k(self.samples, right, k) for right in self.right]

    @property
    def shown(self) -> tuple[int, ...]:
        """The k that are worth a line: powers of 2 and the number of samples.

        >>> SampledResult("spelling", 12, (3,)).shown
        (1, 2, 4, 8, 12)
        """
        return tuple(sorted({2**n for n in range(self.samples.bit_length())} | {self.samples}))


def pass_at_k(answers: int, right: int, k: int) -> float:
    """Chance that of k of these answers, drawn without replacement, one is right: 1 − C(n − c, k) ÷ C(n, k).

    Unbiased (arXiv:2107.03374), unlike "one of the first k". ValueError where there are fewer than k answers.

    >>> [pass_at_k(16, 3, k) for k in (1, 8)]
    [0.1875, 0.9]
    """
    if not 1 <= k <= answers:
        raise ValueError(f"pass@{k} needs at least {k} answers, there are {answers}; ask for more samples")
    return 1 - comb(answers - right, k) / comb(answers, k)


def evaluate_sampled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Any],
    options: SampledOptions,
    accelerator: Accelerator | None = None,
) -> SampledResult:
    """Sample answers to each of `rows` of a task that is generative, and grade them. Every rank gets the result.

    Sample j of question i depends on the seed, i and j alone, so it is the same on any number of processes, up to
    rounding. Raises ValueError if there are no rows.
    """
    if not len(rows):
        raise ValueError(f"task {task.name}: no rows to evaluate; raise the limit")
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    own = range(len(rows))[rank::world]
    conversations = [task.to_conversation(rows[i]) for i in own]
    requests = [
        Request(
            prompt_ids(tokenizer, conversation),
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            seed=f"{options.seed} {i}",
            num_samples=options.samples,
        )
        for i, conversation in zip(own, conversations, strict=True)
    ]
    longest = max((len(request.prompt) for request in requests), default=1)
    engine = Continuous(model, tokenizer, rows=options.rows, length=longest + options.max_new_tokens)
    answers = engine.run(requests)
    right: list[tuple[int, int]] = []
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // world)) as pool:
        for i, conversation, row in zip(own, conversations, answers, strict=True):
            grades = pool.map(lambda answer, c=conversation: bool(task.grade(c, answer.text)), row)
            right.append((i, sum(grades)))
    right = sorted(gather_object(right) if world > 1 else right)
    return SampledResult(task.name, options.samples, tuple(count for _, count in right))
