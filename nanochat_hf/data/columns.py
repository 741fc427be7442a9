"""What a column may hold instead of a list or a mapping: JSON text, a struct of lists, pairs of a map."""

import json
from collections.abc import Mapping
from typing import Any

from nanochat_hf.messages import ConversationError


def renamed(row: Any, columns: Mapping[str, str] | None, where: str = "row") -> Any:
    """The row with its columns renamed, {new name: name in the data}.

    A column that had the new name before gets another name, which says so, and so counts as ignored. ConversationError
    names a column that is not there.

    >>> renamed({"q": "a", "answer": "b", "better": "c"}, {"answer": "better"})
    {'q': 'a', 'answer (replaced by better)': 'b', 'answer': 'c'}
    """
    if not columns or not isinstance(row, dict):
        return row
    for old in columns.values():
        if old not in row:
            raise ConversationError(f"{where}: no column {old!r}; it has {', '.join(map(str, row))}")
    moved = set(columns.values())
    kept = {
        f"{name} (replaced by {columns[name]})" if name in columns else name: value
        for name, value in row.items()
        if name not in moved
    }
    return kept | {new: row[old] for new, old in columns.items()}


def as_list(value: Any, where: str, column: str) -> Any:
    """A list of structs, from JSON text, a list of JSON texts or a struct of lists.

    Any other value is returned as it is.

    >>> as_list('[{"role": "user"}]', "row", "messages")
    [{'role': 'user'}]
    >>> as_list({"role": ["user"], "content": ["hi"]}, "row", "messages")
    [{'role': 'user', 'content': 'hi'}]
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = _json(value, where, column)
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        if len({len(v) for v in value.values()}) > 1:
            raise ConversationError(f"{where}: the lists in {column} have different lengths; give one entry a message")
        entries = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
        return [{k: v for k, v in entry.items() if v is not None} for entry in entries]
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list) and value and all(isinstance(v, str) and v.lstrip()[:1] == "{" for v in value):
        return [_json(v, where, column) for v in value]
    return value


def as_mapping(value: Any) -> Any:
    """A list of pairs, as Arrow returns a map, as a dict; any other value as it is.

    >>> as_mapping([("city", "Oslo")])
    {'city': 'Oslo'}
    """
    is_pairs = isinstance(value, list) and value and all(isinstance(v, tuple) and len(v) == 2 for v in value)
    return dict(value) if is_pairs else value


def _json(text: str, where: str, column: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ConversationError(f"{where}: {column} holds text that is no JSON; give a list of messages") from None


def holds(value: Any) -> bool:
    """Whether a value says anything: None, "" and empty lists and mappings do not."""
    return not (value is None or (isinstance(value, str | list | dict) and not value))
