"""MMLU and ARC: questions with lettered choices, answered by one letter."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from .base import Conversation, Row, Task, load_rows, pair

LETTER = re.compile(r"\(?([A-Z0-9])[.):]?")


def question(text: str, choices: Sequence[str], letters: Sequence[str]) -> str:
    r"""The prompt: the letter follows its choice without a space, so that prompt and answer share the letter's token.

    question("2+2?", ["3", "4"], "AB") →
    "Multiple Choice question: 2+2?\n- 3=A\n- 4=B\n\nRespond only with the letter of the correct answer."
    """
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=True))
    return f"Multiple Choice question: {text}\n{lines}\nRespond only with the letter of the correct answer."


def mmlu(row: Row) -> Conversation:
    """Row {question, choices, answer: index} → conversation with `letters`.

    On the Hub, rows of auxiliary_train lie in a field `train`.
    """
    row = row.get("train") or row
    letters = "ABCDEFGHIJ"[: len(row["choices"])]
    return pair(question(row["question"], row["choices"], letters), letters[row["answer"]]) | {"letters": list(letters)}


def arc(row: Row) -> Conversation:
    """Row {question, choices: {text, label}, answerKey} → conversation with `letters`, the row's own labels."""
    choices = row["choices"]
    return pair(question(row["question"], choices["text"], choices["label"]), row["answerKey"]) | {
        "letters": list(choices["label"])
    }


def same_letter(conversation: Conversation, completion: str) -> bool:
    """True when the completion is the right letter and nothing else.

    " B ", "B.", "B)" and "(B)" are B; "b" and "B or C" are not.
    """
    found = LETTER.fullmatch(completion.strip())
    return found is not None and found[1] == conversation["messages"][-1]["content"]


def _mmlu_rows(split: str = "test", path: str | None = None, limit: int | None = None) -> Any:
    if split == "auxiliary_train":  # on the Hub a configuration of its own, whose only split is train
        return load_rows("cais/mmlu", "auxiliary_train", "train", path, limit)
    return load_rows("cais/mmlu", "all", split, path, limit)


def _arc_rows(name: str) -> Callable[..., Any]:
    return lambda split="test", path=None, limit=None: load_rows("allenai/ai2_arc", name, split, path, limit)


MMLU = Task("mmlu", _mmlu_rows, mmlu, same_letter, kind="categorical", baseline=0.25)
ARC_EASY = Task("arc_easy", _arc_rows("ARC-Easy"), arc, same_letter, kind="categorical", baseline=0.25)
ARC_CHALLENGE = Task("arc_challenge", _arc_rows("ARC-Challenge"), arc, same_letter, kind="categorical", baseline=0.25)
