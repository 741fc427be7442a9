"""What a row of a batch generates, and its tool calls: python_start … python_end → calculator → forced output."""

from collections import deque
from dataclasses import dataclass, field

from ..conversation import PARTS, encode_plain

TOOL_TOKENS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")


@dataclass
class Completion:
    """Generated `ids`; `forced[i]` is True where the tool, not the model, wrote ids[i]; `text` is their decoding, specials kept.

    `finished` tells an end token (which is not among the ids) from running out of max_new_tokens.
    """

    ids: list = field(default_factory=list)
    forced: list = field(default_factory=list)
    text: str = ""
    finished: bool = False


def special_ids(tokenizer):
    """({tool token: id or None}, frozenset of ids that end a row): assistant_end, bos and the tokenizer's own end token."""
    vocabulary = tokenizer.get_vocab()
    ends = {vocabulary.get("<|assistant_end|>"), vocabulary.get("<|bos|>"), tokenizer.eos_token_id} - {None}
    return {token: vocabulary.get(token) for token in TOOL_TOKENS}, frozenset(ends)


def answer_parts(tokenizer, ids):
    """Ids of an answer → the content of an assistant message: text, or the list of parts where a tool was called.

    answer_parts(tokenizer, ids of "6*7 is <|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>42") →
    [{"type": "text", "text": "6*7 is "}, {"type": "python", "text": "6*7"}, {"type": "python_output", "text": "42"}, {"type": "text", …}]
    """
    vocabulary = tokenizer.get_vocab()
    opening = {vocabulary.get(marks[0]): kind for kind, marks in PARTS.items() if marks}
    closing = {vocabulary.get(marks[1]) for marks in PARTS.values() if marks}
    runs = [("text", [])]
    for token in ids:
        if token in opening:
            runs.append((opening[token], []))
        elif token in closing:
            runs.append(("text", []))
        else:
            runs[-1][1].append(token)
    parts = [{"type": kind, "text": tokenizer.decode(run)} for kind, run in runs if run or kind != "text"]
    return "".join(p["text"] for p in parts) if all(p["type"] == "text" for p in parts) else parts


class Row:
    """The state machine of one row: plain, or collecting an expression, or being forced to take a tool's output.

    It is `done` at an end token and when it has `limit` tokens; `last` is the token that the model reads next.
    """

    def __init__(self, tokenizer, calculator, specials=None, limit=None):
        self.tokenizer, self.calculator, self.limit, self.last = tokenizer, calculator, limit, 0
        self.tools, self.ends = specials or special_ids(tokenizer)
        self.out, self.pending, self.expression, self.done = Completion(), deque(), None, False

    @property
    def left(self):
        """Tokens until the limit."""
        return self.limit - len(self.out.ids)

    def take(self, token):
        """Accept the model's `token`, or the pending forced one in its place; returns what was taken."""
        forced = bool(self.pending)
        token = self.pending.popleft() if forced else token
        if not forced and token in self.ends:
            self.done = self.out.finished = True
            return token
        self.last = token
        self.out.ids.append(token)
        self.out.forced.append(forced)
        self.done = self.limit is not None and len(self.out.ids) >= self.limit
        if token == self.tools["<|python_start|>"]:
            self.expression = []
        elif token == self.tools["<|python_end|>"] and self.expression is not None and self.calculator:
            result = self.calculator(self.tokenizer.decode(self.expression))
            self.expression = None
            if result is not None:
                inner = encode_plain(self.tokenizer, result)
                self.pending.extend([self.tools["<|output_start|>"], *inner, self.tools["<|output_end|>"]])
        elif self.expression is not None:
            self.expression.append(token)
        return token
