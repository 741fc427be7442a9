"""Answers that the model wrote, graded, in groups of one question."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nanochat_hf.generation import Completion, Continuous, Request
from nanochat_hf.machine.weights import Twin

from .objectives import is_mixed, overlong_penalty
from .questions import Question
from .rewards import Graded, Grader, Job


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: so many to a question, of so many tokens at most.

    `rows` are decoded at a time. `margin`: of the longest answer, the last tokens over which DAPO's penalty grows;
    0: there is none.
    """

    samples: int = 16
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = 50
    rows: int = 256
    margin: int = 0


@dataclass(frozen=True)
class Answer:
    """One answer. `ids` begin after the prompt and hold the token that ended it, where one did.

    `trained[i]`: the model wrote ids[i], no tool did. `finished`: it ended as an answer should, so neither at the limit
    nor with another end token. `forged`: it wrote a tool's output itself. `log_probs` are the sampler's, of each of
    `ids`; () where they are not known.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    text: str
    finished: bool
    forged: bool = False
    log_probs: tuple[float, ...] = ()
    graded: Graded = field(default_factory=lambda: Graded(math.nan))
    reward: float = math.nan  # what counts; NaN where it is not known

    @property
    def length(self) -> int:
        """Tokens that the model wrote, the end included."""
        return sum(self.trained)


@dataclass(frozen=True)
class Group:
    """Answers to one question: `number` of the run, `index` among the questions."""

    number: int
    index: int
    answers: tuple[Answer, ...]

    @property
    def rewards(self) -> np.ndarray:
        """What each answer earned (G,), NaN where it is not known."""
        return np.array([answer.reward for answer in self.answers])

    @property
    def mixed(self) -> bool:
        """Whether the rewards differ, so that there is something to learn."""
        return is_mixed(self.rewards)


class Writer:
    """Writes answers with the weights that `model` has at the last `refresh`, by continuous batching.

    Rows that end make room for the next answer, and a question is read once. Sample j of a question depends on the
    question's seed and j alone. `longest`: tokens of a prompt. `dtype`: of the products.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        longest: int,
        *,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.dtype = model, tokenizer, sampling, dtype
        self.longest, self.compile = longest, compile
        self.twin: Twin | None = None
        self.engine: Continuous | None = None
        vocabulary = tokenizer.get_vocab()
        self.end = vocabulary.get("<|assistant_end|>", tokenizer.eos_token_id)
        self.outputs = {vocabulary.get(token) for token in ("<|output_start|>", "<|output_end|>")} - {None}

    def refresh(self) -> None:
        """Take over the model's present weights. A collective where they are split among processes."""
        if self.twin is None:  # not before the first call: only then the weights lie where training keeps them
            self.twin = Twin(self.model, self.dtype)
            length = self.longest + self.sampling.max_new_tokens
            self.engine = Continuous(
                self.twin.model, self.tokenizer, rows=self.sampling.rows, length=length, compile=self.compile
            )
        self.twin.refresh()

    def __call__(self, questions: Sequence[Question], seeds: Sequence[str]) -> list[list[Answer]]:
        """The answers to each question, in order; each question has a seed."""
        own = self.sampling
        requests = [
            Request(
                question.prompt,
                max_new_tokens=own.max_new_tokens,
                temperature=own.temperature,
                top_k=own.top_k,
                seed=seed,
                num_samples=own.samples,
                log_probs=True,
            )
            for question, seed in zip(questions, seeds, strict=True)
        ]
        assert self.engine is not None  # `refresh` comes first
        return [[self.answer(completion) for completion in row] for row in self.engine.run(requests)]

    def answer(self, completion: Completion) -> Answer:
        """A completion as an answer, not yet graded."""
        ended = completion.end is not None
        return Answer(
            ids=(*completion.ids, completion.end) if completion.end is not None else tuple(completion.ids),
            trained=(*(not forced for forced in completion.forced), *([True] if ended else [])),
            text=completion.text,
            finished=completion.end == self.end,
            forged=any(i in self.outputs and not f for i, f in zip(completion.ids, completion.forced, strict=True)),
            log_probs=tuple(completion.log_probs),
        )


def grade(
    questions: Sequence[Question], written: Sequence[Sequence[Answer]], grader: Grader, sampling: Sampling
) -> list[tuple[Answer, ...]]:
    """The same answers with what they earned.

    An answer that did not finish, or that wrote a tool's output itself, earns nothing that is above 0: or else the
    model would learn right answers that never stop, and results that it made up.
    """
    jobs = [
        Job(question.conversation, answer.text, question.grade or _no_grade)
        for question, answers in zip(questions, written, strict=True)
        for answer in answers
    ]
    results = iter(grader(jobs))
    graded = []
    for answers in written:
        row = []
        for answer in answers:
            found = next(results)
            total = found.total
            if not math.isnan(total):
                total += overlong_penalty(answer.length, sampling.max_new_tokens, sampling.margin)
                total = total if answer.finished and not answer.forged else min(total, 0.0)
            row.append(dataclasses.replace(answer, graded=found, reward=total))
        graded.append(tuple(row))
    return graded


def _no_grade(conversation, completion):
    raise ValueError("conversations of no task have no grade; give --reward package.module:function")
