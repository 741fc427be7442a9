"""What one row of a batch generates, and its tool calls.

A call is python_start … python_end. The calculator's answer to it is forced on the model as output_start … output_end.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from ..conversation import PARTS, encode_plain

TOOL_TOKENS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")

Calculator = Callable[[str], str | None]  # from an expression to its result; None where it has none


@dataclass
class Completion:
    """What was generated: `ids`, and `text`, their decoding with special tokens.

    `forced[i]` is True where the tool, not the model, wrote ids[i]. `finished` is True where the row met an end token,
    which is not among the ids, and False where it ran out of max_new_tokens; `end` is that token's id, or None.

    `log_probs` and `top` are filled where they were asked for (`Request` in continuous.py): one entry for each of the
    ids, and one more for the end token. `log_probs` holds the log-probability of the token among all tokens, at the
    request's temperature (at 1 where that is 0), and 0 for forced ones. `top` holds the likeliest tokens of the place
    as (id, log-probability), the likeliest first, and nothing for forced ones.
    """

    ids: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    text: str = ""
    finished: bool = False
    end: int | None = None
    log_probs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, int | None], frozenset[int]]:
    """The ids of the tool's tokens, None for those that the tokenizer lacks, and the ids that end a row.

    A row ends at assistant_end, bos, and the tokenizer's own end token.
    """
    vocabulary = tokenizer.get_vocab()
    ends = (vocabulary.get("<|assistant_end|>"), vocabulary.get("<|bos|>"), tokenizer.eos_token_id)
    return {token: vocabulary.get(token) for token in TOOL_TOKENS}, frozenset(i for i in ends if i is not None)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of `ids`; transformers declares that it may be a list of texts, which only a list of lists gives."""
    text = tokenizer.decode(ids)
    assert isinstance(text, str)
    return text


def answer_parts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str | list[dict[str, str]]:
    """Ids of an answer → the content of an assistant message: text, or a list of parts where a tool was called.

    The ids of "6*7 is <|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>42" →
    [{"type": "text", "text": "6*7 is "}, {"type": "python", "text": "6*7"}, {"type": "python_output", "text": "42"},
    {"type": "text", "text": "42"}]
    """
    vocabulary = tokenizer.get_vocab()
    opening = {vocabulary.get(marks[0]): kind for kind, marks in PARTS.items() if marks}
    closing = {vocabulary.get(marks[1]) for marks in PARTS.values() if marks}
    runs: list[tuple[str, list[int]]] = [("text", [])]
    for token in ids:
        if token in opening:
            runs.append((opening[token], []))
        elif token in closing:
            runs.append(("text", []))
        else:
            runs[-1][1].append(token)
    parts = [{"type": kind, "text": decode(tokenizer, run)} for kind, run in runs if run or kind != "text"]
    return "".join(p["text"] for p in parts) if all(p["type"] == "text" for p in parts) else parts


class Row:
    """The state of one row: it generates freely, or collects an expression, or is forced to take the tool's output.

    It is `done` at an end token, and when it has `limit` tokens. `last` is the token that the model reads next.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        calculator: Calculator | None,
        specials: tuple[dict[str, int | None], frozenset[int]] | None = None,
        limit: int | None = None,
    ) -> None:
        self.tokenizer, self.calculator, self.limit, self.last = tokenizer, calculator, limit, 0
        self.tools, self.ends = specials or special_ids(tokenizer)
        self.out, self.done = Completion(), False
        self.pending: deque[int] = deque()
        self.expression: list[int] | None = None

    @property
    def left(self) -> int:
        """Tokens until the limit, for a row that has one."""
        assert self.limit is not None
        return self.limit - len(self.out.ids)

    def take(self, token: int) -> int:
        """Accept the model's `token`, or the pending forced one in its place; returns what was taken."""
        forced = bool(self.pending)
        token = self.pending.popleft() if forced else token
        if not forced and token in self.ends:
            self.done = self.out.finished = True
            self.out.end = token
            return token
        self.last = token
        self.out.ids.append(token)
        self.out.forced.append(forced)
        self.done = self.limit is not None and len(self.out.ids) >= self.limit
        if token == self.tools["<|python_start|>"]:
            self.expression = []
        elif token == self.tools["<|python_end|>"] and self.expression is not None and self.calculator:
            result = self.calculator(decode(self.tokenizer, self.expression))
            self.expression = None
            if result is not None:
                start, end = self.tools["<|output_start|>"], self.tools["<|output_end|>"]
                assert start is not None and end is not None  # a tokenizer has all tokens of the tool or none
                self.pending.extend([start, *encode_plain(self.tokenizer, result), end])
        elif self.expression is not None:
            self.expression.append(token)
        return token
