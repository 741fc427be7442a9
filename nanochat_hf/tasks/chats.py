"""Conversations as they come: SmolTalk from the Hub, and one's own JSON lines."""

from .base import Task, load_rows, same_text


def _smoltalk_rows(split="train", path=None, limit=None):
    return load_rows("HuggingFaceTB/smol-smoltalk", None, split, path, limit)


def _custom_rows(split="train", path=None, limit=None):
    """Lines that are a list of messages or an object with `messages`; the split is the file."""
    import json
    from pathlib import Path

    if path is None:
        raise ValueError(
            "task custom_json needs a path: a file with one conversation a line, as in {task: custom_json, path: a.jsonl}"
        )
    if not Path(path).is_file():
        raise ValueError(f"task custom_json: {path} does not exist; give a file with one conversation a line")
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if limit is not None and len(rows) >= limit:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); correct or remove the line") from None
        rows.append({"messages": row["messages"] if isinstance(row, dict) and "messages" in row else row})
    if not rows:
        raise ValueError(f"task custom_json: {path} holds no conversation; give one a line")
    return rows


def messages(row):
    """The row's messages, unchanged; checked when they are rendered."""
    return {"messages": row["messages"]}


SMOLTALK = Task("smoltalk", _smoltalk_rows, messages, same_text)
CUSTOM_JSON = Task("custom_json", _custom_rows, messages, same_text)
