"""What a task is: rows, their conversation, and the grade of an answer."""

import re
from collections.abc import Callable
from dataclasses import dataclass

NUMBER = re.compile(r"####\s*(-?[\d.,]*\d)")


@dataclass(frozen=True)
class Task:
    """load(split, path=None, limit=None) → rows; to_conversation(row) → conversation; grade(conversation, completion) → bool."""

    name: str
    load: Callable
    to_conversation: Callable
    grade: Callable
    kind: str = "generative"
    baseline: float = 0.0


def final_number(text):
    """final_number("so #### 1,200") → "1200"; None where there is no mark."""
    found = NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


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
