"""GSM8K: school mathematics with calculator marks <<expression=result>>."""

import re
from typing import Any

from .base import Conversation, Row, Task, load_rows, pair, same_number

MARK = re.compile(r"<<([^=>]*)=([^>]*)>>")


def load(split: str = "train", path: str | None = None, limit: int | None = None) -> Any:
    """Rows {question, answer} from the Hub (openai/gsm8k) or a local json(.gz) file."""
    return load_rows("openai/gsm8k", "main", split, path, limit)


def to_conversation(row: Row) -> Conversation:
    """Marks become tool calls: "2+2=<<2+2=4>>4" → parts of text, python, python_output and text."""
    parts, end = [], 0
    for mark in MARK.finditer(row["answer"]):
        parts.append({"type": "text", "text": row["answer"][end : mark.start()]})
        parts += [{"type": "python", "text": mark[1]}, {"type": "python_output", "text": mark[2]}]
        end = mark.end()
    parts.append({"type": "text", "text": row["answer"][end:]})
    return pair(row["question"], parts)


GSM8K = Task("gsm8k", load, to_conversation, same_number)
