"""What a conversation may be, and its pieces in order: (special token or text, is it special, is it learned).

Messages are OpenAI's: system or developer first, then user, assistant and tool; `tools`, JSON schemas, stand beside
them. An assistant's content may also be parts, in which the calculator's calls and answers have their own types.
chat_template.jinja says the same to transformers; tests hold the two together, token by token.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SPECIAL_TOKENS = [
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
]

# The special tokens around a call and a tool's output
MARKS: dict[str, tuple[str, str]] = {
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}
# The kinds of an assistant's parts, and the special tokens around each
PARTS: dict[str, tuple[str, str] | None] = {"text": None, **MARKS}

# Tools whose argument is itself code. A call of one of them, alone in its message and not declared in `tools`, is the
# built-in calculator's: bare code, answered within the turn.
CODE_TOOLS = frozenset(
    {"python", "python_interpreter", "code_interpreter", "execute_python", "run_python", "calculator"}
)
CODE_ARGUMENTS = ("code", "expression", "source", "input")
NAME_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.:/")
TOOLS_HEADING = "Tools, called as NAME{ARGUMENTS}:"

# Which roles may come next: the first user, after a question, after an answer, after the calculator's call, after its
# output (the same turn goes on), after calls of declared tools
FOLLOWERS = {
    "start": ("user",),
    "asked": ("user", "assistant"),
    "answered": ("user",),
    "calculating": ("tool",),
    "calculated": ("user", "assistant"),
    "called": ("tool",),
}

Message = Mapping[str, Any]
Piece = tuple[str, bool, int]


class ConversationError(ValueError):
    """A conversation that cannot be rendered; the message says where and why."""


def validate(conversation: Any, where: str = "conversation") -> None:
    """Check all that `render` needs; ConversationError names `where`, the fault and the remedy."""
    for text, special, _ in layout(conversation, where):
        if not special and (fault := surrogate(text)):
            raise ConversationError(f"{where}: {fault}")


def layout(conversation: Any, where: str = "conversation") -> Iterator[Piece]:
    """The pieces of a conversation, in order. ConversationError, which begins with `where`, for what cannot be written.

    >>> [piece for piece, _, _ in layout({"messages": [{"role": "user", "content": "hi"}]})]
    ['<|bos|>', '<|user_start|>', 'hi', '<|user_end|>']
    """
    head, turns, declared = _opening(conversation, where)
    state, calls, index = "start", [], 0
    yield "<|bos|>", True, 0
    while index < len(turns):
        message, at = turns[index], f"{where}: turn {index + 1}"
        role = _role(message, at, state)
        if role == "user":
            if state == "calculated":
                yield "<|assistant_end|>", True, 1
            yield "<|user_start|>", True, 0
            yield head + text_of(message.get("content"), at), False, 0
            yield "<|user_end|>", True, 0
            head, state = "", "asked"
        elif role == "assistant":
            if state == "asked":
                yield "<|assistant_start|>", True, 0
            calls = _calls(message, at)
            yield from _said(message, bool(calls), at)
            code = calculator_code(calls[0], declared) if len(calls) == 1 else None
            if code is not None:
                yield from _marked("python", code)
            else:
                for call in calls:
                    yield from _marked("python", call_text(call, at))
                yield "<|assistant_end|>", True, 1
            state = "calculating" if code is not None else "called" if calls else "answered"
        elif state == "calculating":
            yield from _marked("python_output", text_of(message.get("content"), at))
            state = "calculated"
        else:
            run = _answers(turns, index)
            for answer in _in_order(run, calls):
                yield from _marked("python_output", text_of(answer.get("content"), at))
            index += len(run) - 1
            state = "asked"
        index += 1


def prompt_pieces(conversation: Any, where: str = "conversation") -> list[Piece]:
    """The pieces of what an assistant is to go on with; the last assistant message, if any, is dropped."""
    validate(conversation, where)
    messages = conversation["messages"]
    messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    pieces = list(layout({**conversation, "messages": messages}, where))
    # the calculator's output leaves the turn open
    opened = [piece for piece, special, _ in pieces if special and piece.startswith("<|assistant_")]
    if opened and opened[-1] == "<|assistant_start|>":
        return pieces
    return [*pieces, ("<|assistant_start|>", True, 0)]


def _opening(conversation: Any, where: str) -> tuple[str, Sequence[Message], frozenset[str]]:
    """(what stands before the first user's text, the turns, the names of the declared tools)."""
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if not isinstance(messages, list) or not messages:
        raise ConversationError(f"{where}: no messages; give {{'messages': [{{'role', 'content'}}, …]}}")
    head, first = "", 0
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ("system", "developer"):
            break
        head += text_of(message.get("content"), f"{where}: the {message['role']} message") + "\n\n"
        first += 1
    if first == len(messages):
        raise ConversationError(f"{where}: only a system message; add a user's message")
    functions = [_function(tool, where) for tool in conversation.get("tools") or ()]
    if functions:
        head += "\n".join([TOOLS_HEADING, *(_json(function, where) for function in functions)]) + "\n\n"
    return head, messages[first:], frozenset(function["name"] for function in functions)


def _function(tool: Any, where: str) -> Mapping[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConversationError(
            f"{where}: the tool {tool!r:.80} has no name; "
            "give {'type': 'function', 'function': {'name', 'parameters'}}"
        )
    return function


def _role(message: Any, at: str, state: str) -> str:
    role, expected = message.get("role") if isinstance(message, Mapping) else None, FOLLOWERS[state]
    if isinstance(role, str) and role in expected:
        return role
    reason = {
        "calculating": "a tool call must be answered before anything else is said",
        "called": "tool calls must be answered before anything else is said",
    }.get(state, "the user asks, the assistant answers; system messages come first, tool messages after tool_calls")
    raise ConversationError(f"{at} has role {role!r}, must be {' or '.join(map(repr, expected))} ({reason})")


def text_of(content: Any, at: str) -> str:
    """The text of a message: a string, or parts that are all text, joined; ConversationError for anything else.

    >>> text_of([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "here")
    'ab'
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ConversationError(f"{at} has content of type {type(content).__name__}; give text (or parts of text)")
    for part in content:
        if not _is_part(part) or part["type"] != "text":
            raise ConversationError(f"{at} has the part {part!r:.80}; only {{'type': 'text', 'text'}} can stand here")
    return "".join(part["text"] for part in content)


def surrogate(text: str) -> str | None:
    """The fault of a text that holds half of a surrogate pair, which UTF-8 cannot encode; None for a sound text."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"the text holds half a character, {text[error.start]!r}; write the whole character, or remove it"
    return None


def _is_part(part: Any) -> bool:
    return (
        isinstance(part, Mapping)
        and isinstance(part.get("type"), str)
        and part["type"] in PARTS
        and isinstance(part.get("text"), str)
    )


def _said(message: Message, has_calls: bool, at: str) -> Iterator[Piece]:
    """The pieces of an assistant's content. Adjacent texts are one text, as they are one text to the tokenizer."""
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif content is None and has_calls:
        content = []
    elif not isinstance(content, list):
        raise ConversationError(f"{at} has content of type {type(content).__name__}; give text, parts, or tool_calls")
    if not (content or has_calls):
        raise ConversationError(f"{at} has no parts; give text, parts, or tool_calls")
    for part in content:
        if not _is_part(part):
            raise ConversationError(
                f"{at} has the part {part!r:.80}; parts are {{'type': {' | '.join(PARTS)}, 'text'}}"
            )
    text = ""
    for part in content:
        if part["type"] == "text":
            text += part["text"]
            continue
        yield text, False, 1
        text = ""
        yield from _marked(part["type"], part["text"])
    yield text, False, 1


def _marked(kind: str, text: str) -> Iterator[Piece]:
    """A call or an output between its special tokens; what a tool says is not learned."""
    learned = int(kind != "python_output")
    start, end = MARKS[kind]
    yield start, True, learned
    yield text, False, learned
    yield end, True, learned


def _calls(message: Message, at: str) -> list[Mapping[str, Any]]:
    """The functions that a message calls: mappings with name, arguments and, where given, the call's id."""
    if message.get("function_call"):
        raise ConversationError(f"{at} has a function_call, which is an old form; give tool_calls")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ConversationError(f"{at} has tool_calls of type {type(calls).__name__}; give a list")
    functions = []
    for call in calls:
        function = call.get("function") or call if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ConversationError(f"{at} calls no function by name; give {{'function': {{'name', 'arguments'}}}}")
        functions.append({"name": function["name"], "arguments": function.get("arguments"), "id": call.get("id")})
    return functions


def calculator_code(call: Mapping[str, Any], declared: frozenset[str] = frozenset()) -> str | None:
    """The code of a call of the built-in calculator, None for any other call.

    >>> calculator_code({"name": "python", "arguments": '{"code": "6*7"}'})
    '6*7'
    """
    name, arguments = call["name"], call["arguments"]
    if name not in CODE_TOOLS or name in declared:
        return None
    if isinstance(arguments, str):
        text = arguments.strip()
        if not (text.startswith("{") and text.endswith("}")):
            return arguments if text else None
        try:
            given = json.loads(text, object_pairs_hook=list, strict=False)
        except ValueError:
            return None  # call_text says what is wrong
    elif isinstance(arguments, int | float) and not isinstance(arguments, bool):
        return str(arguments)
    elif isinstance(arguments, Mapping):
        given = [(key, value) for key, value in arguments.items() if value is not None]  # Arrow fills up with None
    else:
        return None
    if len(given) == 1 and given[0][0] in CODE_ARGUMENTS and isinstance(given[0][1], str):
        return given[0][1]
    return None


def call_text(call: Mapping[str, Any], at: str = "call") -> str:
    """How a call of a declared tool is written: its name and its arguments as a JSON object, a string of JSON as it is.

    >>> call_text({"name": "weather", "arguments": {"city": "Rome"}})
    'weather{"city": "Rome"}'
    """
    name, arguments = call["name"], call["arguments"]
    if not name or not NAME_LETTERS.issuperset(name):
        raise ConversationError(f"{at} calls {name!r}; a tool's name has letters, digits and _ - . : / only")
    if arguments is None:
        return name + "{}"
    if isinstance(arguments, Mapping):
        return name + _json(arguments, at)
    text = arguments.strip() if isinstance(arguments, str) else None
    if text == "":
        return name + "{}"
    try:
        if text is None or not isinstance(json.loads(text), dict):
            raise ValueError
    except ValueError:
        raise ConversationError(
            f"{at} calls {name} with {arguments!r:.80}; arguments must be a JSON object, as a mapping or as text"
        ) from None
    return name + text


def _json(value: Any, at: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ConversationError(
            f"{at} holds what JSON cannot ({error}); give text, numbers, lists and mappings"
        ) from None


def _answers(turns: Sequence[Message], start: int) -> Sequence[Message]:
    """The tool messages from turn `start` on."""
    end = start
    while end < len(turns) and isinstance(turns[end], Mapping) and turns[end].get("role") == "tool":
        end += 1
    return turns[start:end]


def _in_order(answers: Sequence[Message], calls: list[Mapping[str, Any]]) -> list[Message]:
    """Answers in the order of the calls whose ids they name, then those that name none."""
    place = {call["id"]: i for i, call in reversed([*enumerate(calls)]) if isinstance(call["id"], str)}
    last = len(calls)
    return sorted(answers, key=lambda a: place.get(a["tool_call_id"], last) if _names_call(a) else last)


def _names_call(answer: Message) -> bool:
    return isinstance(answer.get("tool_call_id"), str)
