"""The forms in which data sets hold conversations, and the conversion of a row to `{"messages": [...]}`."""

import json

from nanochat_hf.conversation import ConversationError

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "call",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
# Tools whose argument is itself Python; any other call is written as the Python call it describes.
CODE_TOOLS = {"python", "python_interpreter", "code_interpreter", "execute_python", "run_python", "calculator"}
CODE_ARGUMENTS = ("code", "expression", "source", "input")


def row_format(row, where="row"):
    """The form of a row: row_format({"prompt": "a", "completion": "b"}) → "prompt_completion"; ConversationError lists the columns."""
    if isinstance(row, list):
        return "list"
    if not isinstance(row, dict):
        raise ConversationError(f"{where}: holds {type(row).__name__}; give an object with messages")
    for name, (_, columns) in FORMATS.items():
        if columns and all(column in row for column in columns):
            return name
    raise ConversationError(
        f"{where}: columns {', '.join(map(str, row))}; need messages, conversations, prompt+completion or instruction+output"
    )


def convert_row(row, where="row", form=None):
    """A row as messages, a bare list of messages, ShareGPT, prompt/completion or Alpaca → a conversation.

    `form` names one of FORMATS; None takes the first that the columns fit. OpenAI's tool calls become python parts:
    [user, assistant with tool_calls, tool, assistant] → [user, assistant with text, python, python_output and text parts].
    """
    form = form or row_format(row, where)
    convert, columns = FORMATS[form]
    missing = [c for c in columns if not isinstance(row, dict) or c not in row]
    if missing:
        has = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise ConversationError(f"{where}: no column {missing[0]} for the form {form}; it has {has}")
    messages = convert(row, where)
    return {"messages": merge_tools(messages, where) if _has_tools(messages) else messages}


def _sharegpt(row, where):
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(
        isinstance(t, dict) and isinstance(t.get("from"), str) and "value" in t for t in turns
    ):
        raise ConversationError(f"{where}: conversations must be a list of {{'from', 'value'}}")
    messages = []
    for turn in turns:
        role = SHAREGPT_ROLES.get(turn["from"], turn["from"])
        if role == "call":
            messages.append({"role": "assistant", "content": None, "function_call": _json(turn["value"], where)})
        else:
            messages.append({"role": role, "content": turn["value"]})
    if isinstance(row.get("system"), str) and row["system"] and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    return messages


def _prompt_completion(row, where):
    messages = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    # lists of messages, as TRL has them
    return messages + (
        row["completion"]
        if isinstance(row["completion"], list)
        else [{"role": "assistant", "content": row["completion"]}]
    )


def _alpaca(row, where):
    asked = [row["instruction"], row.get("input") or ""]
    if not all(isinstance(text, str) for text in asked):
        raise ConversationError(f"{where}: instruction and input must be text")
    return [
        {"role": "user", "content": "\n\n".join(filter(None, asked))},
        {"role": "assistant", "content": row["output"]},
    ]


# form → (row → messages, the columns it needs); the first that fits is taken
FORMATS = {
    "messages": (lambda row, where: row["messages"], ("messages",)),
    "sharegpt": (_sharegpt, ("conversations",)),
    "prompt_completion": (_prompt_completion, ("prompt", "completion")),
    "alpaca": (_alpaca, ("instruction", "output")),
    "list": (lambda row, where: row, ()),
}


def _has_tools(messages):
    """True where a message is of a kind that only OpenAI's format knows; anything malformed is left to `validate`."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return False
    return any(
        m.get("role") in ("tool", "function", "developer")
        or m.get("tool_calls")
        or m.get("function_call")
        or (m.get("role") in ("user", "system") and isinstance(m.get("content"), list))
        for m in messages
    )


def merge_tools(messages, where="row"):
    """OpenAI's messages → ours: developer is system, content lists of text are text, and an assistant's calls, the tools' answers
    and the assistant's next words are parts of one turn. ConversationError for a call or a part that has no text form."""
    merged, calls, after_tool = [], [], False
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role in ("tool", "function"):
            name, code = _answered(calls, message, where)
            merged[-1]["content"] += [
                {"type": "python", "text": code},
                {"type": "python_output", "text": _text(content, where)},
            ]
            after_tool = True
            continue
        if calls:
            merged[-1]["content"] += [{"type": "python", "text": code} for _, code in calls]
            calls = []
        if role != "assistant":
            merged.append({"role": "system" if role == "developer" else role, "content": _text(content, where)})
        else:
            if not after_tool:
                merged.append({"role": "assistant", "content": []})
            merged[-1]["content"] += _parts(content)
            calls = [_call(call, where) for call in message.get("tool_calls") or []]
            if message.get("function_call"):
                calls.append(_call({"function": message["function_call"]}, where))
        after_tool = False
    if calls:
        merged[-1]["content"] += [{"type": "python", "text": code} for _, code in calls]
    for message in merged:
        content = message["content"]
        if (
            isinstance(content, list)
            and len(content) == 1
            and isinstance(content[0], dict)
            and content[0].get("type") == "text"
        ):
            message["content"] = content[0]["text"]
    return merged


def _answered(calls, message, where):
    """Take the call that a tool's message answers out of the open ones: by its id, else the oldest."""
    if not calls:
        raise ConversationError(
            f"{where}: a {message['role']} message answers no call; put it behind an assistant's tool_calls"
        )
    wanted = message.get("tool_call_id")
    index = next((i for i, (number, _) in enumerate(calls) if number == wanted), None)
    if index is None and wanted is not None and any(number is not None for number, _ in calls):
        raise ConversationError(f"{where}: tool_call_id {wanted!r} is none of the open calls; give the id of a call")
    return calls.pop(index or 0)


def _call(call, where):
    """A tool call → (its id, Python text): calculator(expression="2*3") → "2*3"; look_up(city="Rome") → "look_up(city='Rome')"."""
    function = call.get("function") if isinstance(call, dict) else None
    function = function if isinstance(function, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ConversationError(
            f"{where}: a tool call without a function's name; give {{'function': {{'name', 'arguments'}}}}"
        )
    name, arguments = function["name"], function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError:
            arguments = arguments if name in CODE_TOOLS else None
    number = call.get("id")
    if name in CODE_TOOLS:
        if isinstance(arguments, dict):  # Arrow fills the arguments of other calls in as None
            arguments = next((arguments[k] for k in CODE_ARGUMENTS if isinstance(arguments.get(k), str)), None)
        if isinstance(arguments, str | int | float):
            return number, str(arguments)
        raise ConversationError(
            f"{where}: the call of {name} has no code; give arguments with one of {', '.join(CODE_ARGUMENTS)}"
        )
    if (
        not isinstance(arguments, dict)
        or not name.replace(".", "_").isidentifier()
        or not all(k.isidentifier() for k in arguments)
    ):
        raise ConversationError(
            f"{where}: the call of {name!r} cannot be written as Python; its arguments must be a JSON object of names"
        )
    return number, f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


def _parts(content):
    if content is None:
        return []
    return list(content) if isinstance(content, list) else [{"type": "text", "text": content}]


def _text(content, where):
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            raise ConversationError(f"{where}: a message has a part that is not text; only text can be trained on")
        return "".join(part["text"] for part in content)
    return content


def _json(text, where):
    try:
        return json.loads(text)
    except (TypeError, json.JSONDecodeError):
        raise ConversationError(f"{where}: a function_call is not JSON; give {{'name', 'arguments'}}") from None
