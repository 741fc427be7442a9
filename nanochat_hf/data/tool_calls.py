"""OpenAI's tool calls → messages that can be rendered.

Where a row declares its tools, the prompt lists them and calls stay calls, in the form that clients of the model use
(`declared_calls`). Where it does not, a call becomes the Python code that it describes, within one turn
(`merge_tools`): [user, assistant with tool_calls, tool, assistant] → [user, assistant with text, python,
python_output and text parts].
"""

import json
from typing import Any

from nanochat_hf.messages import CODE_ARGUMENTS, CODE_TOOLS, ConversationError

from .columns import as_list, as_mapping

Message = dict[str, Any]
Call = tuple[Any, str]  # id, Python text


def has_tools(messages: Any) -> bool:
    """Whether a message has something that only OpenAI's format has; malformed messages are left to `validate`."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return False
    return any(
        m.get("role") in ("tool", "function", "developer")
        or m.get("tool_calls")
        or m.get("function_call")
        or (m.get("role") in ("user", "system") and isinstance(m.get("content"), list))
        for m in messages
    )


def merge_tools(messages: list[Message], where: str = "row") -> list[Message]:
    """OpenAI's messages → ours.

    The role developer becomes system, and lists of text parts become text. An assistant's calls, the tools' answers and
    the assistant's next words become parts of one turn. Each part keeps the `weight` and `train` of its message, since
    several messages may become one turn. ConversationError for content that is not text.
    """
    merged: list[Message] = []
    calls: list[Call] = []
    after_tool, marks = False, {}
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role in ("tool", "function"):
            code = _answered(calls, message, where)
            merged[-1]["content"] += [
                {"type": "python", "text": code} | marks,
                {"type": "python_output", "text": plain_text(content, where)},
            ]
            after_tool = True
            continue
        if calls:
            merged[-1]["content"] += [{"type": "python", "text": code} | marks for _, code in calls]
            calls = []
        if role != "assistant":
            merged.append({"role": "system" if role == "developer" else role, "content": plain_text(content, where)})
        else:
            marks = {key: message[key] for key in ("weight", "train") if message.get(key) is not None}
            if not after_tool:
                merged.append({"role": "assistant", "content": []})
            merged[-1]["content"] += _parts(content, marks)
            calls = _calls(message, where)
        after_tool = False
    if calls:
        merged[-1]["content"] += [{"type": "python", "text": code} | marks for _, code in calls]
    return [_simplified(message) for message in merged]


def declared_calls(messages: Any, where: str = "row") -> Any:
    """Messages of a row that declares tools, in OpenAI's present form.

    A `function_call` becomes the one entry of `tool_calls`, the role function becomes tool, and calls that a column
    holds as text or as a struct of lists become a list. Malformed messages are left to `validate`.
    """
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return messages
    found = []
    for message in messages:
        message = {key: value for key, value in message.items() if value is not None or key == "content"}
        if message.get("role") == "function":
            message["role"] = "tool"
        if call := message.pop("function_call", None):
            message["tool_calls"] = [{"type": "function", "function": call}]
        if "tool_calls" in message:
            calls = as_list(message["tool_calls"], where, "tool_calls")
            message["tool_calls"] = [_plain_call(c) for c in calls] if isinstance(calls, list) else calls
            message.setdefault("content", None)
        found.append(message)
    return found


def _plain_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    return {**call, "function": {**function, "arguments": as_mapping(function.get("arguments"))}}


def _simplified(message: Message) -> Message:
    """A turn of one text part as plain text."""
    content = message["content"]
    if not isinstance(content, list) or len(content) != 1 or not isinstance(content[0], dict):
        return message
    marks = {key: content[0][key] for key in ("weight", "train") if key in content[0]}
    return {**message, "content": content[0]["text"], **marks} if content[0].get("type") == "text" else message


def _calls(message: Message, where: str) -> list[Call]:
    listed = as_list(message.get("tool_calls") or [], where, "tool_calls")
    calls = [_call(call, where) for call in listed]
    if message.get("function_call"):
        calls.append(_call({"function": message["function_call"]}, where))
    return calls


def _answered(calls: list[Call], message: Message, where: str) -> str:
    """Remove from `calls` the one that a tool's message answers, by its id or else the oldest; returns its Python."""
    if not calls:
        raise ConversationError(
            f"{where}: a {message['role']} message answers no call; put it after an assistant's tool_calls"
        )
    wanted = message.get("tool_call_id")
    index = next((i for i, (number, _) in enumerate(calls) if number == wanted), None)
    if index is None and wanted is not None and any(number is not None for number, _ in calls):
        raise ConversationError(f"{where}: tool_call_id {wanted!r} is none of the open calls; give the id of a call")
    return calls.pop(index or 0)[1]


def _call(call: Any, where: str) -> Call:
    """A tool call → (its id, its Python text).

    The call of a code tool is its code: calculator(expression="2*3") → "2*3". Any other call is written as one:
    look_up(city="Rome") → "look_up(city='Rome')".
    """
    function = call.get("function") if isinstance(call, dict) else None
    function = function if isinstance(function, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ConversationError(
            f"{where}: a tool call without a function's name; give {{'function': {{'name', 'arguments'}}}}"
        )
    name, arguments = function["name"], as_mapping(function.get("arguments"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError:
            arguments = arguments if name in CODE_TOOLS else None
    number = call.get("id")
    if name in CODE_TOOLS:
        if isinstance(arguments, dict):
            arguments = next((arguments[k] for k in CODE_ARGUMENTS if isinstance(arguments.get(k), str)), None)
        if isinstance(arguments, str | int | float):
            return number, str(arguments)
        raise ConversationError(
            f"{where}: the call of {name} has no code; give arguments with one of {', '.join(CODE_ARGUMENTS)}"
        )
    arguments = {} if arguments is None and "arguments" not in function else arguments
    if (
        not isinstance(arguments, dict)
        or not name.replace(".", "_").isidentifier()
        or not all(isinstance(k, str) and k.isidentifier() for k in arguments)
    ):
        raise ConversationError(
            f"{where}: the call of {name!r} cannot be written as Python; its arguments must be a JSON object of names"
        )
    return number, f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


def _parts(content: Any, marks: Message) -> list:
    if content is None:
        return []
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return [part | marks if isinstance(part, dict) else part for part in parts] if marks else list(parts)


def plain_text(content: Any, where: str) -> Any:
    """The text of a message's content, where a list of text parts is joined.

    ConversationError for a part that is not text. Content that is neither text nor a list is left to `validate`.
    """
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            raise ConversationError(f"{where}: a message has a part that is not text; only text can be trained on")
        return "".join(part["text"] for part in content)
    return content
