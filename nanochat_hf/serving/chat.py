"""/v1/chat/completions: JSON → the engine's request, and what it writes → JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from uuid import uuid4

from nanochat_hf.conversation import ConversationError, encode_plain, render_prompt
from nanochat_hf.generation import Request

from .errors import bad
from .fields import Fields
from .served import Served
from .writing import Token, Writer, Written

KNOWN = frozenset(
    "logprobs max_completion_tokens max_tokens messages model n parallel_tool_calls seed stop stream stream_options "
    "temperature tool_choice tools top_k top_logprobs top_p".split()
)
MOST_TOP = 20  # of top_logprobs


@dataclass(frozen=True)
class Chat:
    """A request for a chat's next message; the same methods as `completions.Completions`."""

    served: Served
    requests: Sequence[Request]
    stream: bool
    usage: bool
    stops: Sequence[str]
    declared: frozenset[str]
    opened: Sequence[int]  # of the call that tool_choice asks for, already in the prompt
    one_call: bool
    log_probs: bool

    kind: ClassVar[str] = "chat.completion"
    chunk_kind: ClassVar[str] = "chat.completion.chunk"
    id_prefix: ClassVar[str] = "chatcmpl-"

    def writer(self, request: int) -> Writer:
        """What reads one sample's tokens."""
        return Writer(self.served.tokenizer, self.stops, self.declared, self.opened, self.one_call)

    def first(self, request: int) -> dict[str, Any]:
        """A choice's first chunk."""
        return {"delta": {"role": "assistant", "content": "", "refusal": None}}

    def piece(self, written: Written) -> dict[str, Any]:
        """A choice's next chunk. Beside OpenAI's fields, `parts` are what the calculator was asked and said."""
        delta: dict[str, Any] = {"content": written.text} if written.text else {}
        if written.parts:
            delta["parts"] = written.parts
        if written.calls:
            delta["tool_calls"] = [{"index": written.start + i, **call(one)} for i, one in enumerate(written.calls)]
        return {"delta": delta} | self._scored(written.tokens)

    def whole(self, writer: Writer, tokens: Sequence[Token], request: int) -> dict[str, Any]:
        """A choice, at once."""
        message: dict[str, Any] = {"role": "assistant", "content": writer.text, "refusal": None}
        if writer.calls:
            message |= {"content": writer.text or None, "tool_calls": [call(one) for one in writer.calls]}
        if any(part["type"] != "text" for part in writer.parts):
            message["parts"] = writer.parts
        return {"message": message} | self._scored(tokens)

    def reason(self, writer: Writer, finished: bool) -> str:
        """Why a choice ended."""
        if not (finished or writer.stopped):
            return "length"
        return "tool_calls" if writer.calls else "stop"

    def _scored(self, tokens: Sequence[Token]) -> dict[str, Any]:
        if not self.log_probs:
            return {"logprobs": None}
        return {"logprobs": {"content": [self._token(token) for token in tokens], "refusal": None}}

    def _token(self, token: Token) -> dict[str, Any]:
        def entry(number: int, log_prob: float) -> dict[str, Any]:
            raw = self.served.raw(number)
            return {"token": raw.decode(errors="replace"), "logprob": log_prob, "bytes": list(raw)}

        return entry(token.id, token.log_prob) | {"top_logprobs": [entry(*one) for one in token.top]}


def call(one: tuple[str, str]) -> dict[str, Any]:
    """(name, arguments) → a tool call, with a new id."""
    name, arguments = one
    return {"id": f"call_{uuid4().hex[:24]}", "type": "function", "function": {"name": name, "arguments": arguments}}


def parse(fields: Fields, served: Served) -> Chat:
    """A request's fields → what runs; ApiError for what cannot be."""
    fields.know(KNOWN)
    sampling, stream = served.sampling(fields), fields.flag("stream")
    wanted = fields.whole("max_completion_tokens", 1, None, fields.whole("max_tokens", 1, None, None))
    log_probs, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MOST_TOP, 0)
    if top and not log_probs:
        raise bad("top_logprobs", "top_logprobs needs logprobs=true")
    usage = fields.usage_wanted(stream)
    tools, choice = _tools(fields)
    prompt = _prompt(served, fields.given.get("messages"), [] if choice == "none" else tools)
    opened = _opened(served, choice)
    request = served.request(
        [*prompt, *opened],
        wanted,
        "messages",
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        num_samples=sampling.n,
        log_probs=log_probs,
        top=top,
    )
    return Chat(
        served,
        [request],
        stream,
        usage,
        fields.stops(),
        frozenset() if choice == "none" else frozenset(tool["function"]["name"] for tool in tools),
        opened,
        isinstance(choice, list) or not fields.flag("parallel_tool_calls", True),
        log_probs,
    )


def _prompt(served: Served, messages: Any, tools: Sequence[Mapping[str, Any]]) -> list[int]:
    if not isinstance(messages, list) or not messages:
        raise bad("messages", "messages must be a non-empty list of messages")
    if isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant":
        raise bad("messages", "the last message is the assistant's; end with a message of the user or of a tool")
    served.check_characters(_characters(messages) + _characters(tools), "messages")
    try:
        return render_prompt(served.tokenizer, {"messages": messages, "tools": tools})
    except ConversationError as error:
        raise bad("messages", str(error)) from None


def _characters(value: Any) -> int:
    """Characters of all texts inside some JSON; it came from a parser, so it is no deeper than that allows."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return sum(map(_characters, inner))


def _tools(fields: Fields) -> tuple[list[Mapping[str, Any]], str | list[str]]:
    """(the declared tools, tool_choice: auto, none, required, or a list of the one name)."""
    tools, choice = fields.given.get("tools", []), fields.given.get("tool_choice")
    if not isinstance(tools, list):
        raise bad("tools", "tools must be a list")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise bad(f"tools[{i}]", f"tools[{i}] must be {{'type': 'function', 'function': {{'name', 'parameters'}}}}")
    names = [tool["function"]["name"] for tool in tools]
    if choice is None:
        return tools, "auto"
    if not tools and choice != "none":
        raise bad("tool_choice", "tool_choice is only allowed with tools")
    if isinstance(choice, str) and choice in ("auto", "none", "required"):
        return tools, choice
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or name not in names:
        raise bad(
            "tool_choice",
            f"tool_choice={choice!r:.80} must be auto, none, required, or name one of the tools: {', '.join(names)}",
        )
    return tools, [name]


def _opened(served: Served, choice: str | list[str]) -> list[int]:
    """The tokens with which the answer must begin."""
    if choice != "required" and not isinstance(choice, list):
        return []
    start = served.tokenizer.convert_tokens_to_ids("<|python_start|>")
    assert isinstance(start, int)
    return [start, *(encode_plain(served.tokenizer, choice[0]) if isinstance(choice, list) else [])]
