"""What is asked: the questions of tasks and of the user's own conversations, in the order of a seed."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from nanochat_hf.conversation import render_prompt
from nanochat_hf.data.conversations import conversations
from nanochat_hf.data.reports import DataReport, SourceReport
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.tasks import get_task

from .rewards import Reward


@dataclass(frozen=True)
class Question:
    """A conversation whose last answer is to be written by the model, the ids up to there, and how it is graded.

    `grade` is None for conversations of no task, which rewards of the user's own must judge.
    """

    source: str
    conversation: dict[str, Any]
    prompt: tuple[int, ...]
    grade: Reward | None


class Questions(Sequence[Question]):
    """All questions of a run. `visits` goes through them again and again, each time in another order."""

    def __init__(self, questions: Sequence[Question], seed: int = 0, reports: Sequence[SourceReport] = ()) -> None:
        self.questions, self.seed, self.report = list(questions), seed, DataReport(reports)
        self._order: tuple[int, np.ndarray] = -1, np.zeros(0, dtype=np.int64)

    @classmethod
    def load(
        cls, sources: Sequence[SourceConfig], tokenizer: PreTrainedTokenizerBase, most: int, seed: int = 0
    ) -> "Questions":
        """The questions of `sources` whose prompts have at most `most` tokens; others are counted as dropped.

        ValueError for every fault of the data, for a conversation without a question, and where no question is left.
        """
        found: list[Question] = []
        reports = []
        for source in sources:
            report = SourceReport(source.label, form="task" if source.task else "list")
            grade = get_task(source.task).grade if source.task else None
            kept = []
            for number, converted in enumerate(conversations(source)):
                conversation = converted.conversation
                if [m["role"] for m in conversation["messages"][-2:]] != ["user", "assistant"]:
                    raise ValueError(
                        f"{source.label} row {number}: does not end in a question and its answer; correct or remove it"
                    )
                prompt = tuple(render_prompt(tokenizer, conversation))
                report.seen += 1
                if len(prompt) > most:
                    report.dropped += 1
                    continue
                report.conversations += 1
                report.tokens += len(prompt)
                kept.append(Question(source.task or source.label, conversation, prompt, grade))
            found += kept * source.repeat
            reports.append(report)
        if not found:
            raise ValueError(f"no question has a prompt of at most {most} tokens; raise --max-seq-len")
        return cls(found, seed, reports)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: Any) -> Any:
        return self.questions[index]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(question.prompt) for question in self.questions)

    @property
    def digest(self) -> str:
        """Hex digest of all prompts, in order: the identity of the data."""
        found = hashlib.sha256()
        for question in self.questions:
            found.update(json.dumps(question.prompt).encode())
        return found.hexdigest()[:32]

    def visit(self, number: int) -> tuple[int, int]:
        """Question `number` of the run → (its visit, its index): 7 of 5 questions is the third one of visit 1."""
        visit, place = divmod(number, len(self.questions))
        if self._order[0] != visit:
            self._order = visit, np.random.default_rng((self.seed, visit)).permutation(len(self.questions))
        return visit, int(self._order[1][place])
