"""What a task is: rows, their conversation, and the grade of an answer."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

# possessive: a model that writes white space for ever would otherwise cost cubic time
NUMBER = re.compile(r"####\s*+\$?+\s*+(-?+\s*+\$?+\s*+[\d.,]*\d)")


@dataclass(frozen=True)
class Task:
    """load(split, path=None, limit=None) → rows; to_conversation(row) → conversation; grade(conversation, completion) → bool.

    `kind` is generative or categorical (then the conversation holds its `letters`), `baseline` the accuracy of guessing; `notice()`, if
    any, is a line to print before the answers are graded.
    """

    name: str
    load: Callable
    to_conversation: Callable
    grade: Callable
    kind: str = "generative"
    baseline: float = 0.0
    notice: Callable | None = None


def final_number(text):
    """final_number("so #### $1,200.0") → Decimal("1200"), of several marks the last; None where no number follows a mark."""
    found = NUMBER.findall(text)
    try:
        return Decimal(re.sub(r"[,$\s]", "", found[-1])) if found else None
    except InvalidOperation:  # such as 1.2.3
        return None


def answer_text(conversation):
    """The last assistant message as one string, parts joined."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def same_number(conversation, completion):
    """True when the number behind #### is that of the reference answer."""
    return final_number(completion) is not None and final_number(completion) == final_number(answer_text(conversation))


def same_text(conversation, completion):
    """True when the answer is the reference answer, white space at the ends apart."""
    return completion.strip() == answer_text(conversation).strip()


def pair(question, answer):
    """A conversation of one question and one answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def load_rows(name, config, split, path, limit):
    """Rows of a local file (json, jsonl, parquet, …, maybe compressed) where `path` is given, else of the Hub's `name`; at most `limit`.

    ValueError, in one line, where they cannot be had.
    """
    from datasets import load_dataset

    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: must be at least 1; leave it out for all rows")
    try:
        if path:
            kind = "parquet" if str(path).endswith(".parquet") else "csv" if str(path).endswith(".csv") else "json"
            data = load_dataset(kind, data_files=str(path), split="train")
        else:
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
