"""Batches that the model writes itself: questions → answers → rewards → advantages → rows, a step at a time.

Nothing is drawn ahead and no generator has a state: question g of the run follows from the seed and g, its answers from
the seed, the visit, the question and the sample, and from the weights. So the number of questions that were used is all
that a checkpoint must hold (and, amid several updates on the same answers, these).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from nanochat_hf.data.reports import DataReport
from nanochat_hf.model.policy_nanochat_hf import Policy

from .answers import Answer, Group, Sampling, grade
from .metrics import RolloutMetrics, rollout_metrics
from .objectives import advantages, token_factors
from .questions import Question, Questions
from .rewards import Grader
from .rows import Batch, Row, Shape, micro_batches
from .watch import Watch


@dataclass(frozen=True)
class Objective:
    """How answers become a gradient. `refills`: times a step's questions may be drawn anew to replace equal groups."""

    questions: int = 16
    advantage: str = "mean"
    normalisation: str = "tokens"
    policy: Policy = field(default_factory=Policy)
    kl: float = 0.0
    updates: int = 1
    refills: int = 0
    mask_truncated: bool = False


@dataclass(frozen=True)
class Setup:
    """How answers are drawn, what they become, and the shape of batches; `pad` fills rows up."""

    objective: Objective
    sampling: Sampling
    shape: Shape
    pad: int


class Write(Protocol):
    """How answers are written."""

    def refresh(self) -> object:
        """Take over the present weights; called before a step's answers, on every process."""
        ...

    def __call__(self, questions: Sequence[Question], seeds: Sequence[str]) -> list[list[Answer]]:
        """The answers to each question, in order, not yet graded; each question has a seed."""
        ...


@dataclass(frozen=True)
class Models:
    """The model that is trained, how answers are written with its weights, and the one to stay close to, if any."""

    trained: Any
    write: Write
    start: Any = None


@dataclass(frozen=True)
class Drawn:
    """What a step has drawn: all groups, in order, and those to train on."""

    groups: list[Group]
    kept: list[Group]
    refills: int


class RolloutBatches:
    """Endless micro-batches of a model's own answers, `accumulation` for each optimizer step; see data/batches.py.

    Every process draws the same questions, answers its share of them, and learns all answers and rewards. Then each
    takes its share of the rows, whatever groups they are of. `seen` is called with what was drawn, after each rollout.
    """

    def __init__(
        self, questions: Questions, models: Models, grader: Grader, accelerator: Accelerator, setup: Setup
    ) -> None:
        self.questions, self.models, self.grader, self.accelerator = questions, models, grader, accelerator
        self.objective, self.sampling, self.shape, self.pad = setup.objective, setup.sampling, setup.shape, setup.pad
        self.metrics, self.watch = RolloutMetrics(self.objective.policy), Watch()
        self.next_question, self.used = 0, 0
        self.held: list[Batch] | None = None  # answers for which more updates are to come
        self.seen: list[Callable[[Drawn], object]] = []

    @property
    def report(self) -> DataReport:
        """What became of the questions."""
        return self.questions.report

    @property
    def epoch(self) -> float:
        """Passes over the questions so far."""
        return self.next_question / len(self.questions)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if self.held is None:
                self.held, self.used = self._roll_out(), 0
            batches, self.used = self.held, self.used + 1
            if self.used >= self.objective.updates:
                self.held = None
            yield from batches

    def _roll_out(self) -> list[Batch]:
        begin = time.perf_counter()
        drawn = self.draw()
        seconds = time.perf_counter() - begin
        self.watch.look(drawn.groups, self.sampling.max_new_tokens)
        answers = [answer for group in drawn.groups for answer in group.answers]
        prompts = sum(len(self.questions[group.index].prompt) * len(group.answers) for group in drawn.groups)
        self.metrics.tokens_seen += prompts + sum(len(answer.ids) for answer in answers)
        rows = self.rows(drawn.kept)
        self.metrics.add(
            rollout_metrics(drawn.groups, [reward.name for reward in self.grader.rewards])
            | {
                "rollout/seconds": seconds,
                "rollout/tokens_per_second": sum(answer.length for answer in answers) / seconds,
                "rollout/questions": len(drawn.groups),
                "rollout/replaced": len(drawn.groups) - self.objective.questions,
                "rollout/refills": drawn.refills,
            }
        )
        for listener in self.seen:
            listener(drawn)
        return self._with_log_probs(micro_batches(rows, self.shape, self.pad))

    def draw(self) -> Drawn:
        """Answers to the next questions, and to further ones in place of those whose answers all earn the same."""
        wanted = self.objective.questions
        self.models.write.refresh()
        groups, refills = self._answer(wanted), 0
        while refills < self.objective.refills and (missing := wanted - sum(group.mixed for group in groups)) > 0:
            groups += self._answer(missing)
            refills += 1
        mixed = [group for group in groups if group.mixed]
        # without refills equal groups stay: they have no advantage, but their tokens count, as in the reference
        kept = groups if not self.objective.refills else mixed
        return Drawn(groups, kept if mixed else [], refills)

    def _answer(self, count: int) -> list[Group]:
        # the groups of the next questions, on all processes alike
        numbers = range(self.next_question, self.next_question + count)
        self.next_question += count
        own = numbers[self.accelerator.process_index :: self.accelerator.num_processes]
        found: list[Group] = []
        said = None
        try:
            found = self._own_groups(own)
        except ValueError as error:  # all processes end with it, or they would wait for this one
            said = str(error)
        if self.accelerator.num_processes > 1:
            shared = gather_object([(found, said)])
            found = [group for part, _ in shared for group in part]
            said = next((text for _, text in shared if text is not None), None)
        if said is not None:
            raise ValueError(said)
        return sorted(found, key=lambda group: group.number)

    def _own_groups(self, numbers: Sequence[int]) -> list[Group]:
        if not len(numbers):
            return []
        visits = [self.questions.visit(number) for number in numbers]
        asked = [self.questions[index] for _, index in visits]
        seeds = [f"{self.questions.seed} {visit} {index}" for visit, index in visits]
        graded = grade(asked, self.models.write(asked, seeds), self.grader, self.sampling)
        return [
            Group(number, index, answers) for number, (_, index), answers in zip(numbers, visits, graded, strict=True)
        ]

    def rows(self, groups: Sequence[Group]) -> list[Row]:
        """The answers to train on, with their weights: advantage times the factor of the normalisation."""
        chosen = []
        for group in groups:
            prompt = self.questions[group.index].prompt
            values = advantages(group.rewards, self.objective.advantage)
            for answer, advantage, reward in zip(group.answers, values, group.rewards, strict=True):
                masked = self.objective.mask_truncated and not answer.finished
                if answer.length and reward == reward and not masked:
                    chosen.append((prompt, answer, advantage))
        factors = token_factors(
            [answer.length for _, answer, _ in chosen], self.objective.normalisation, self.sampling.max_new_tokens
        )
        return [
            Row(
                ids=(*prompt, *answer.ids),
                trained=(*[False] * len(prompt), *answer.trained),
                weight=float(advantage * factor),
                factor=float(factor),
                log_probs=(*[0.0] * len(prompt), *answer.log_probs),
            )
            for (prompt, answer, advantage), factor in zip(chosen, factors, strict=True)
        ]

    def _with_log_probs(self, batches: list[Batch]) -> list[Batch]:
        # what the weights before the first update, and the model to stay close to, say of each token
        if self.objective.updates > 1:
            batches = [batch | {"old_log_probs": self._log_probs(self.models.trained, batch)} for batch in batches]
        kept = []
        for batch in batches:
            factors = batch.pop("factors")
            if self.models.start is not None:
                batch = batch | {
                    "start_log_probs": self._log_probs(self.models.start, batch),
                    "kl_weights": self.objective.kl * factors,
                }
            kept.append(batch)
        return kept

    @torch.no_grad()
    def _log_probs(self, model: Any, batch: Batch) -> torch.Tensor:
        # in training mode, so that kernels and rounding are those of the update
        before, device = model.training, self.accelerator.device
        model.train()
        given = {name: value.to(device) for name, value in batch.items() if name != "factors"}
        with self.accelerator.autocast():
            found = model(**given).log_probs.float().cpu()
        model.train(before)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The number of the run's next question, the identity of the questions, and what is collected."""
        return {
            "next_question": self.next_question,
            "num_questions": len(self.questions),
            "questions": self.questions.digest,
            "seed": self.questions.seed,
            "world_size": self.accelerator.num_processes,
            "held": self.held,
            "used": self.used,
            "watch": self.watch.state_dict(),
            "metrics": self.metrics.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at `state`; ValueError where the questions, the seed or (amid updates) the processes differ."""
        if state["questions"] != self.questions.digest:
            raise ValueError(
                f"the checkpoint's run has {state['num_questions']} questions, this run's {len(self.questions)} are "
                "others; resume with the same --tasks or recipe"
            )
        if state["seed"] != self.questions.seed:
            raise ValueError(
                f"the checkpoint's questions are drawn by seed {state['seed']}, this run's by {self.questions.seed}; "
                "give that seed"
            )
        same = state["world_size"] == self.accelerator.num_processes
        if state["held"] is not None and not same:
            raise ValueError(
                f"the checkpoint lies between two updates on the same answers, which {state['world_size']} processes "
                f"hold, this run has {self.accelerator.num_processes}; resume with as many, or from a step before"
            )
        self.next_question, self.used = int(state["next_question"]), int(state["used"])
        self.held = state["held"] if self.used < self.objective.updates else None
        self.watch = Watch(**state["watch"])
        if same:
            self.metrics.load_state_dict(state["metrics"], self.accelerator.device)
        else:
            self.metrics.tokens_seen = int(state["metrics"]["tokens_seen"])
