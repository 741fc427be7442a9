"""Stop 2: the forms in which data sets hold conversations, and the conversion of a row to {"messages": [...]}."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nanochat_hf.messages import ConversationError

from .columns import as_list, holds
from .tool_calls import has_calls, present_calls

Message = dict[str, Any]
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "function_call": "call",
    "tool_call": "call",
    "function": "tool",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
MESSAGE_KEYS = {"role", "content", "weight", "train", "tool_calls", "function_call"}  # that are used
TURN_KEYS = {"from", "value"}
ANSWER_KEYS = {"tool_call_id", "name"}  # of a tool's message


@dataclass(frozen=True)
class Form:
    """How rows of one kind become messages.

    `convert` makes the messages, of a row and its place. `needs` are the columns that a row must have, `uses` those
    that it may have.
    """

    convert: Callable[[Any, str], Any]
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()


def row_format(row: Any, where: str = "row") -> str:
    """The form of a row; ConversationError lists the columns.

    >>> row_format({"prompt": "a", "completion": "b"})
    'prompt_completion'
    """
    if isinstance(row, list):
        return "list"
    if not isinstance(row, dict):
        raise ConversationError(f"{where}: holds {type(row).__name__}; give an object with messages")
    for name, form in FORMATS.items():
        if form.needs and all(column in row for column in form.needs):
            return name
    raise ConversationError(
        f"{where}: columns {', '.join(map(str, row))}; need messages, conversations, prompt+completion or "
        "instruction+output"
    )


def convert_row(row: Any, where: str = "row", form: str | None = None) -> dict[str, Any]:
    """A row as messages, a bare list of messages, ShareGPT, prompt/completion or Alpaca → a conversation.

    `form` names one of FORMATS; None takes the first that the columns fit. A `system` column becomes the system
    message, and a `tools` column the conversation's tools. Tool calls become OpenAI's `tool_calls`, see tool_calls.py.

    >>> convert_row({"instruction": "hi", "output": "yes", "history": [["a", "b"]]})["messages"][1]
    {'role': 'assistant', 'content': 'b'}
    """
    form = form or row_format(row, where)
    missing = [c for c in FORMATS[form].needs if not isinstance(row, dict) or c not in row]
    if missing:
        has = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise ConversationError(f"{where}: no column {missing[0]} for the form {form}; it has {has}")
    messages = FORMATS[form].convert(row, where)
    if isinstance(row, dict):
        messages = _with_system(messages, row.get("system"), where)
    conversation = {"messages": present_calls(messages, where) if has_calls(messages) else messages}
    tools = as_list(row.get("tools"), where, "tools") if isinstance(row, dict) else None
    if not holds(tools):
        return conversation
    if not isinstance(tools, list):
        raise ConversationError(f"{where}: tools holds {type(tools).__name__}; give a list of function schemas")
    return conversation | {"tools": tools}


def ignored(row: Any, form: str) -> Iterator[str]:
    """The parts of a row that hold something but are not used: columns, and keys of messages as "messages.KEY"."""
    if not isinstance(row, dict):
        listed, label = row, "messages"
    else:
        used = FORMATS[form].needs + FORMATS[form].uses
        yield from (str(name) for name, value in row.items() if name not in used and holds(value))
        label = "conversations" if form == "sharegpt" else "messages"
        listed = row.get(label)
    for message in listed if isinstance(listed, list) else ():
        if isinstance(message, dict):
            known = MESSAGE_KEYS | TURN_KEYS if "from" in message else MESSAGE_KEYS
            known = known | ANSWER_KEYS if message.get("role") in ("tool", "function") else known
            for key in message.keys() - known:
                if holds(message[key]):
                    yield f"{label}.{key}"


def _with_system(messages: Any, system: Any, where: str) -> Any:
    if not holds(system):
        return messages
    if not isinstance(system, str):
        raise ConversationError(f"{where}: system holds {type(system).__name__}; give text")
    first = messages[0] if isinstance(messages, list) and messages and isinstance(messages[0], dict) else {}
    return messages if first.get("role") == "system" else [{"role": "system", "content": system}, *messages]


def _messages(row: dict, where: str) -> Any:
    return as_list(row["messages"], where, "messages")


def _sharegpt(row: dict, where: str) -> list[Message]:
    turns = as_list(row["conversations"], where, "conversations")
    if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
        raise ConversationError(
            f"{where}: conversations must be a list of {{'from', 'value'}} or {{'role', 'content'}}"
        )
    return [_turn(turn, where) for turn in turns]


def _is_turn(turn: Any) -> bool:
    if not isinstance(turn, dict):
        return False
    return ("role" in turn and "from" not in turn) or (isinstance(turn.get("from"), str) and "value" in turn)


def _turn(turn: dict, where: str) -> Message:
    if "from" not in turn:
        return turn
    marks = {key: turn[key] for key in ("weight", "train") if turn.get(key) is not None}
    role = SHAREGPT_ROLES.get(turn["from"], turn["from"])
    if role == "call":
        return {"role": "assistant", "content": None, "function_call": _function_call(turn["value"], where), **marks}
    return {"role": role, "content": turn["value"], **marks}


def _function_call(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return value
    try:
        return json.loads(value)
    except (TypeError, ValueError):
        raise ConversationError(f"{where}: a function_call is not JSON; give {{'name', 'arguments'}}") from None


def _prompt_completion(row: dict, where: str) -> list[Message]:
    """Texts, or lists of messages, as TRL has them."""
    prompt, completion = row["prompt"], row["completion"]
    return [
        *(prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]),
        *(completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]),
    ]


def _alpaca(row: dict, where: str) -> list[Message]:
    asked = [row["instruction"], row.get("input") or ""]
    if not all(isinstance(text, str) for text in asked):
        raise ConversationError(f"{where}: instruction and input must be text")
    messages = []
    for pair in as_list(row.get("history") or [], where, "history"):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ConversationError(f"{where}: history must be a list of [question, answer]; it has {str(pair)[:60]!r}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages.append({"role": "user", "content": "\n\n".join(filter(None, asked))})
    return [*messages, {"role": "assistant", "content": row["output"]}]


def _list(row: Any, where: str) -> Any:
    return row


# In order: a row has the first form of which it has all the columns
FORMATS: dict[str, Form] = {
    "messages": Form(_messages, ("messages",), ("system", "tools")),
    "sharegpt": Form(_sharegpt, ("conversations",), ("system", "tools")),
    "prompt_completion": Form(_prompt_completion, ("prompt", "completion"), ("system", "tools")),
    "alpaca": Form(_alpaca, ("instruction", "output"), ("input", "system", "history", "tools")),
    "list": Form(_list),
}
