"""Rewards: a task's grade, and functions of the user's own. Slow ones run in threads, with a limit of time.

A reward is a function (conversation, completion) → number. The conversation is the task's, with the reference answer as
its last message; the completion is the text that the model wrote, special tokens included, without its end.
"""

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat_hf.config import imported

Reward = Callable[[dict[str, Any], str], float]
GRADE = "grade"  # the task's own


@dataclass(frozen=True)
class NamedReward:
    """A reward with its name and its weight in the sum; `function` None is the grade of the question's task."""

    name: str
    function: Reward | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Job:
    """An answer to grade: its question's conversation, its text, and the grade of its task."""

    conversation: dict[str, Any]
    text: str
    grade: Reward


@dataclass(frozen=True)
class Graded:
    """What an answer earned. `total` is NaN, and `errors` says why, where one of its rewards could not be had."""

    total: float
    parts: dict[str, float] = field(default_factory=dict)
    errors: tuple[str, ...] = ()


def parse_rewards(text: str) -> list[NamedReward]:
    """The rewards of --reward: names with commas, each "grade" or package.module:function, with =WEIGHT or without.

    >>> [(reward.name, reward.weight) for reward in parse_rewards("grade,math:fabs=0.5")]
    [('grade', 1.0), ('fabs', 0.5)]

    ValueError for what cannot be imported, a weight that is no number, and two of one name.
    """
    found = []
    for entry in text.split(","):
        name, _, weight = (part.strip() for part in entry.partition("="))
        try:
            factor = float(weight) if weight else 1.0
        except ValueError:
            factor = math.nan
        if not math.isfinite(factor):
            raise ValueError(f"--reward {entry.strip()}: the weight {weight!r} is no number; give one, such as =0.5")
        function = None if name == GRADE else function_of(name)
        found.append(NamedReward(name.rpartition(":")[2], function, factor))
    names = [reward.name for reward in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--reward {text}: {twice[0]} stands there twice; give each once, with =WEIGHT")
    return found


def function_of(name: str) -> Reward:
    """The function that "package.module:function" names, looked for in the working directory too."""
    if not all(name.partition(":")):
        raise ValueError(f"--reward {name}: must be {GRADE} or package.module:function, such as rewards:short")
    found = imported(name, f"--reward {name}")
    if not callable(found):
        raise ValueError(f"--reward {name}: is {type(found).__name__}, no function; name a function")
    return found


class Grader:
    """Grades answers in threads that live as long as the process; `seconds` is the limit of one reward of one answer.

    A call that takes longer is given up: its answer has no reward, and its thread, which Python cannot end, is replaced
    by another. Results stand in the order of the jobs, whatever finished first.
    """

    def __init__(self, rewards: Sequence[NamedReward], seconds: float = 30.0, threads: int = 8) -> None:
        self.rewards, self.seconds, self.threads = tuple(rewards), seconds, threads
        self.calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self.alive = 0

    def __call__(self, jobs: Sequence[Job]) -> list[Graded]:
        """Each job's rewards and their weighted sum. ValueError where a reward returns no number."""
        calls = [[_Call(reward, job) for reward in self.rewards] for job in jobs]
        for row in calls:
            for call in row:
                self.calls.put(call)
        while self.alive < min(self.threads, len(jobs) * len(self.rewards)):
            self._start()
        for row in calls:
            for call in row:
                while not call.done.wait(timeout=self._left(call)):
                    if call.started is not None and self._left(call) <= 0:
                        call.give_up(self.seconds)
                        self._start()
        return [self._graded(row) for row in calls]

    def _left(self, call):
        # seconds until the limit; as many as the limit while the call waits for a thread
        return self.seconds if call.started is None else max(0.0, call.started + self.seconds - time.monotonic())

    def _start(self):
        self.alive += 1
        threading.Thread(target=_work, args=(self.calls,), daemon=True, name="reward").start()

    def _graded(self, row):
        errors = tuple(f"{call.reward.name}: {call.error}" for call in row if call.error)
        parts = {call.reward.name: call.value for call in row}
        total = math.nan if errors else sum(call.reward.weight * call.value for call in row)
        return Graded(total, parts, errors)

    def close(self) -> None:
        """Let the threads end."""
        for _ in range(self.alive):
            self.calls.put(None)
        self.alive = 0


class _Call:
    """One reward of one answer, while it is computed and afterwards."""

    def __init__(self, reward: NamedReward, job: Job) -> None:
        self.reward, self.job, self.done = reward, job, threading.Event()
        self.started: float | None = None
        self.returned: Any = None
        self.error, self.given_up = "", False

    def run(self) -> None:
        self.started = time.monotonic()
        function = self.reward.function or self.job.grade
        try:
            returned, error = function(self.job.conversation, self.job.text), ""
        except Exception as raised:  # the user's code may raise anything
            returned, error = None, f"{type(raised).__name__}: {' '.join(str(raised).split())[:200]}"
        if not self.given_up:
            self.returned, self.error = returned, error
            self.done.set()

    def give_up(self, seconds: float) -> None:
        self.given_up, self.error = True, f"took longer than {seconds:g} s"
        self.done.set()

    @property
    def value(self) -> float:
        """The reward; NaN after an error."""
        if self.error:
            return math.nan
        try:
            number = math.nan if isinstance(self.returned, str | None) else float(self.returned)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"--reward {self.reward.name}: returned {str(self.returned)[:60]!r} "
                f"({type(self.returned).__name__}) for the answer {self.job.text[:40]!r}; return a finite number"
            )
        return number


def _work(calls):
    while (call := calls.get()) is not None:
        call.run()
        if call.given_up:
            return  # another thread has taken this one's place
