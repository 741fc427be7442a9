"""What a task is: rows, their conversation, and the grade of an answer."""

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from nanochat_hf.files.listing import list_local
from nanochat_hf.files.rows import load_files

# Possessive quantifiers: without them a long run of white space would cost cubic time.
NUMBER = re.compile(r"####\s*+\$?+\s*+(-?+\s*+\$?+\s*+[\d.,]*\d)")

# the splits that may be named for a local file
SPLITS = ("train", "validation", "test", "dev", "auxiliary_train")

Row = Any  # of a task: a dict of its columns
Conversation = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Rows, how a row becomes a conversation, and how an answer is graded.

    The three are load(split, path=None, limit=None), to_conversation(row) and grade(conversation, completion) → bool.

    `kind` is generative or categorical (then the conversation holds its `letters`), `baseline` the accuracy of
    guessing; `notice()`, if any, is a line to print before the answers are graded. to_conversation raises ValueError,
    in one line, for a row that does not fit.
    """

    name: str
    load: Callable[..., Any]
    to_conversation: Callable[[Row], Conversation]
    grade: Callable[..., bool]
    kind: str = "generative"
    baseline: float = 0.0
    notice: Callable[[], str | None] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "to_conversation", fitting(self.name, self.to_conversation))


def fitting(name: str, to_conversation: Callable[[Row], Conversation]) -> Callable[[Row], Conversation]:
    """`to_conversation`, with an error of one line for a row with other columns or values."""

    @functools.wraps(to_conversation)
    def converted(row: Row) -> Conversation:
        try:
            return to_conversation(row)
        except KeyError as error:
            has = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"no column {error} for the task {name}; it has {has}") from None
        except (TypeError, IndexError, AttributeError, ValueError) as error:
            if isinstance(error, ValueError) and "\n" not in str(error) and ";" in str(error):
                raise
            raise ValueError(f"the row {str(row)[:60]!r} does not fit the task {name} ({error}); correct it") from None

    return converted


def final_number(text: str) -> Decimal | None:
    """The number after the last ####; None where none follows.

    >>> final_number("so #### $1,200.0")
    Decimal('1200.0')
    """
    found = NUMBER.findall(text)
    try:
        return Decimal(re.sub(r"[,$\s]", "", found[-1])) if found else None
    except InvalidOperation:  # such as 1.2.3
        return None


def answer_text(conversation: Conversation) -> str:
    """The last assistant message as one string, parts joined."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def same_number(conversation: Conversation, completion: str) -> bool:
    """True when the number after #### is that of the reference answer."""
    return final_number(completion) is not None and final_number(completion) == final_number(answer_text(conversation))


def same_text(conversation: Conversation, completion: str) -> bool:
    """True when the answer is the reference answer, white space at the ends apart."""
    return completion.strip() == answer_text(conversation).strip()


def pair(question: str, answer: Any) -> Conversation:
    """A conversation of one question and one answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def load_rows(name: str, config: str | None, split: str, path: str | None, limit: int | None) -> Any:
    """Rows of the local file `path`, else of the Hub's data set `name`; at most `limit`.

    The rows of a local file are those of any `split`. Raises ValueError, in one line, where the rows cannot be read.
    """
    from datasets import load_dataset

    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: must be at least 1; leave it out for all rows")
    try:
        if path:
            if split not in SPLITS:
                raise ValueError(f"no split {split!r}; give one of {', '.join(SPLITS)}, or leave it out")
            data = load_files(list_local(os.path.expanduser(str(path))).files, str(path))
            return data if limit is None else data.select([(0, limit)])
        data = load_dataset(name, config, split=split) if config else load_dataset(name, split=split)
    except Exception as error:  # datasets raises its own kinds for each fault; the user needs the reason in one line
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        remedy = (
            "check the file"
            if path
            else "check the split and the connection, or give the path of a local file in a recipe"
        )
        raise ValueError(f"{path or name}, split {split!r}: cannot be loaded ({reason}); {remedy}") from error
    return data if limit is None else data.select(range(min(limit, len(data))))
