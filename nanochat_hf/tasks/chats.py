"""Conversations as they come: SmolTalk from the Hub, and one's own file."""

from pathlib import Path
from typing import Any

from nanochat_hf.files.listing import list_local
from nanochat_hf.files.rows import Rows, load_files

from .base import Conversation, Task, load_rows, same_text


def _smoltalk_rows(split: str = "train", path: str | None = None, limit: int | None = None) -> Any:
    return load_rows("HuggingFaceTB/smol-smoltalk", None, split, path, limit)


def _custom_rows(split: str = "train", path: str | None = None, limit: int | None = None) -> Rows:
    """Rows of a file; each is a list of messages or an object with `messages`. The split has no meaning here."""
    if path is None:
        raise ValueError(
            "task custom_json needs a path: a file with one conversation a line, as in {task: custom_json, path: "
            "a.jsonl}"
        )
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"task custom_json: {path} does not exist; give a file with one conversation a line")
    rows = load_files(list_local(str(file)).files, str(path))
    rows = rows if limit is None else rows.select([(0, limit)])
    if not len(rows):
        raise ValueError(f"task custom_json: {path} holds no conversation; give one a line")
    return rows


def messages(row: Any) -> Conversation:
    """The row's messages, unchanged; checked when they are rendered."""
    return {"messages": row["messages"]}


def custom(row: Any) -> Conversation:
    """An object's messages, or the row itself where it is the list of them; checked when they are rendered."""
    return {"messages": row["messages"] if isinstance(row, dict) and "messages" in row else row}


SMOLTALK = Task("smoltalk", _smoltalk_rows, messages, same_text)
CUSTOM_JSON = Task("custom_json", _custom_rows, custom, same_text)
