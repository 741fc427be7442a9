"""Tokens of one sample → text, calls of tools, and the tokens' log-probabilities, as they come."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from nanochat_hf.generation.pieces import Pieces

Part = dict[str, str]  # {"type": text, python or python_output, "text"}


@dataclass(frozen=True)
class Token:
    """One token of the text: its id, its log-probability, and the likeliest tokens there."""

    id: int
    log_prob: float
    top: Sequence[tuple[int, float]]


@dataclass
class Written:
    """The next that came: text and its tokens, or one part (the calculator's), or one call (name, arguments).

    `start` is where it stands: of a text the characters before it, of a call the calls.
    """

    start: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)


class Writer:
    """Takes the ids of one sample and gives out what can be shown.

    Text that may be the beginning of a stop string is held back, and so is a call until it is whole. `declared` are
    the names of the request's tools; any other call is the calculator's. `opened` is what the prompt has already
    begun of a call. `stopped` tells that the answer ends here, though the model would go on: a stop string was met,
    or with `one_call` the first call is whole. A `plain` writer knows no calls: all but special tokens is text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[str] = (),
        declared: frozenset[str] = frozenset(),
        opened: Sequence[int] = (),
        one_call: bool = False,
        plain: bool = False,
    ) -> None:
        self.pieces, self.stops, self.declared, self.one_call = Pieces(tokenizer), stops, declared, one_call
        if plain:
            self.pieces.opening, self.pieces.closing = {}, set()
        self.special = special_ids(tokenizer)
        self.parts: list[Part] = []  # all of the answer so far, in the form that a conversation takes
        self.calls: list[tuple[str, str]] = []
        self.stopped = False
        self.held = ""  # text that was not given out
        self.length = self.given = 0  # characters of the text that were decoded, and that were given out
        self.waiting: list[tuple[int, Token]] = []  # tokens that were not given out, and where their text begins
        self.code: str | None = None  # of a call that is not whole
        for token in opened:
            self._feed(token, None, [])

    @property
    def text(self) -> str:
        """What was said, without calls."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    def feed(
        self, ids: Sequence[int], log_probs: Sequence[float] = (), top: Sequence[Sequence[tuple[int, float]]] = ()
    ) -> list[Written]:
        """Take the next ids; lists of log-probabilities are as long, or empty. What comes back is in order."""
        out: list[Written] = []
        for i, token in enumerate(ids):
            if self.stopped:
                break
            scored = Token(token, log_probs[i], top[i] if top else ()) if log_probs else None
            self._feed(token, scored, out)
        return out

    def end(self) -> list[Written]:
        """What was held back, once the sample is over. A call that is not whole is given where it names a tool."""
        out: list[Written] = []
        if not self.stopped:
            self._pieces(self.pieces.rest(), out)
            self._give(self.held, out)
            self.held = ""
        call = _call(self.code or "", self.declared)
        if call and not (self.one_call and self.calls):
            self._called(call, out)
        self.code = None
        return out

    def _feed(self, token: int, scored: Token | None, out: list[Written]) -> None:
        pieces, before = self.pieces, self.pieces.kind
        if token in self.special and token not in pieces.opening and token not in pieces.closing:
            return  # a special token out of place is no text
        if scored and before == "text" and token not in pieces.opening:
            self.waiting.append((self.length, scored))
        self._pieces(pieces.feed(token), out)
        if self.stopped or (token not in pieces.opening and token not in pieces.closing):
            return
        if before != "text":
            self._close(before, out)
        if pieces.kind != "text":
            self.code = ""

    def _pieces(self, pieces: Sequence[tuple[str, str]], out: list[Written]) -> None:
        for kind, text in pieces:
            if kind != "text":
                self.code = (self.code or "") + text
                continue
            self.length += len(text)
            self.held += text
            self._look_for_stops(out)

    def _look_for_stops(self, out: list[Written]) -> None:
        found = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if found:
            self._give(self.held[: min(found)], out)
            self.held, self.stopped, self.waiting = "", True, []
            return
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        ready = len(self.held) - keep
        self._give(self.held[:ready], out)
        self.held = self.held[ready:]

    def _give(self, text: str, out: list[Written]) -> None:
        if not text:
            return
        if not out or not out[-1].text:
            out.append(Written(self.given))
        out[-1].text += text
        self.given += len(text)
        out[-1].tokens += [token for start, token in self.waiting if start < self.given]
        self.waiting = [(start, token) for start, token in self.waiting if start >= self.given]
        if self.parts and self.parts[-1]["type"] == "text":
            self.parts[-1]["text"] += text
        else:
            self.parts.append({"type": "text", "text": text})

    def _close(self, kind: str, out: list[Written]) -> None:
        """A call or an output is whole."""
        code, self.code = self.code or "", None
        call = _call(code, self.declared) if kind == "python" else None
        if call:
            self._called(call, out)
            self.stopped = self.one_call
            return
        self._give(self.held, out)  # no stop string goes across a call
        self.held = ""
        self.parts.append({"type": kind, "text": code})
        out.append(Written(self.given, parts=[self.parts[-1]]))

    def _called(self, call: tuple[str, str], out: list[Written]) -> None:
        out.append(Written(len(self.calls), calls=[call]))
        self.calls.append(call)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of all special tokens; transformers' `all_special_ids` has only those with a role."""
    return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, which is not whole in it.

    >>> _overlap("one END", "END."), _overlap("one", "END.")
    (3, 0)
    """
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _call(code: str, declared: frozenset[str]) -> tuple[str, str] | None:
    """NAME{ARGUMENTS} → (name, arguments) where the tool is declared.

    >>> _call('weather{"city": "Rome"}', frozenset({"weather"}))
    ('weather', '{"city": "Rome"}')
    """
    name, brace, rest = code.partition("{")
    return (name, brace + rest) if brace and name in declared else None
