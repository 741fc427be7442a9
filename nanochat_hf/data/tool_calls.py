"""Tool calls as data sets hold them → OpenAI's present form, which messages.py writes.

[user, assistant with function_call, function, assistant] → [user, assistant with tool_calls, tool, assistant]. Whether
a row declares its tools or not, a call is trained on as `NAME{ARGUMENTS}`, the form that the chat template writes and
that clients parse. The built-in calculator's call is bare code, see messages.CODE_TOOLS.
"""

from typing import Any

from .columns import as_list, as_mapping

Message = dict[str, Any]


def has_calls(messages: Any) -> bool:
    """Whether a message calls a tool or is a tool's; malformed messages are left to `validate`."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return False
    return any(m.get("role") in ("tool", "function") or m.get("tool_calls") or m.get("function_call") for m in messages)


def present_calls(messages: list[Message], where: str = "row") -> list[Message]:
    """Messages with calls in OpenAI's present form.

    A `function_call` becomes the one entry of `tool_calls`, the role function becomes tool, and calls that a column
    holds as text or as a struct of lists become a list. What is malformed is left to `validate`.

    >>> present_calls([{"role": "assistant", "function_call": {"name": "now"}}])
    [{'role': 'assistant', 'tool_calls': [{'type': 'function', 'function': {'name': 'now'}}], 'content': None}]
    """
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
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    return {**call, "function": {**function, "arguments": as_mapping(function["arguments"])}}
