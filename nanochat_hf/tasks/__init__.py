"""The registry: one line a task."""

from ..config import guessed, imported
from .base import Task
from .chats import CUSTOM_JSON, SMOLTALK
from .generated import CALCULATOR, IDENTITY_TASK, RANDOM_SPELLING, SIMPLE_SPELLING, SPELLING_BEE
from .gsm8k import GSM8K
from .humaneval import HUMANEVAL
from .multiple_choice import ARC_CHALLENGE, ARC_EASY, MMLU

EVERY = (
    SIMPLE_SPELLING,
    RANDOM_SPELLING,
    SPELLING_BEE,
    CALCULATOR,
    IDENTITY_TASK,
    GSM8K,
    HUMANEVAL,
    MMLU,
    ARC_EASY,
    ARC_CHALLENGE,
    SMOLTALK,
    CUSTOM_JSON,
)
TASKS = {task.name: task for task in EVERY}
__all__ = ["TASKS", "Task", "get_task"]


def get_task(name: str) -> Task:
    """The task called `name`, or one of the user's own, "package.module:TASK"; ValueError lists the names there are."""
    if ":" in name:
        found = imported(name, f"task {name}")
        if not isinstance(found, Task):
            raise ValueError(f"task {name}: is {type(found).__name__}, no Task; see docs/howto/task.md")
        return found
    if name not in TASKS:
        raise ValueError(
            f"task {guessed([repr(name)], map(repr, TASKS))} is unknown; choose from {', '.join(sorted(TASKS))}"
        )
    return TASKS[name]
