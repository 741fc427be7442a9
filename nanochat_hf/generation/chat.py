"""A conversation with a model, kept as the ids that it read and wrote.

The same text, rendered again, may get other ids.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, TypedDict, Unpack

from ..conversation import PARTS, encode_plain, render, render_prompt
from .engine import Engine
from .pieces import Piece, Pieces
from .sampling import check_sampling
from .tools import answer_parts

NEW_TOKENS = 256  # the most in an answer, where no setting says


class ChatSettings(TypedDict, total=False):
    """How answers are sampled, as `Engine.stream` takes it."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None


class Chat:
    """Turns of one conversation: `messages` as conversation.py has them, `ids` from bos to the last assistant_end.

    Turn n samples with seed + n, so the same questions get the same answers.
    """

    def __init__(
        self, engine: Engine, *, system: str | None = None, seed: int = 0, **settings: Unpack[ChatSettings]
    ) -> None:
        check_sampling(**settings)
        self.engine, self.seed, self.settings = engine, seed, settings
        vocabulary = engine.tokenizer.get_vocab()
        self.token = {
            name: vocabulary[name]
            for name in ("<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")
        }
        self.opening = {vocabulary[marks[0]]: kind for kind, marks in PARTS.items() if marks}
        self.closing = {vocabulary[marks[1]] for marks in PARTS.values() if marks}
        self.clear(system)

    def clear(self, system: str | None = None) -> None:
        """Begin anew, with the system message `system` or none."""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self.ids: list[int] = []

    def replay(self, messages: Iterable[dict[str, Any]]) -> None:
        """Take these messages as the conversation so far."""
        self.messages = list(messages)
        self.ids = render(self.engine.tokenizer, {"messages": self.messages})[0]

    def ask(self, text: str) -> Generator[Piece, None, None]:
        """Yield the answer as it comes: (kind, piece) with kind text, python or python_output.

        Pieces are whole characters. However the answer ends, also closed or interrupted, the conversation then holds
        the question and what is whole of the answer; a tool call that was cut off is left out.

        Raises ValueError when the conversation does not fit the positions of the model.
        """
        prompt = self._prompt(text)
        most = self.settings.get("max_new_tokens", NEW_TOKENS)
        positions = getattr(self.engine.model.config, "max_position_embeddings", None)
        room = most if positions is None else positions - len(prompt)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens, the model sees {positions}; begin anew with /clear, "
                "or ask something shorter"
            )
        settings: ChatSettings = {**self.settings, "max_new_tokens": min(most, room)}
        answer: list[int] = []
        turn = len(self.messages) // 2
        try:
            yield from self._pieces(self.engine.stream(prompt, seed=self.seed + turn, **settings), answer)
        finally:
            answer = self._whole(answer)
            self.messages.append({"role": "user", "content": text})
            self.messages.append({"role": "assistant", "content": answer_parts(self.engine.tokenizer, answer)})
            self.ids = [*prompt, *answer, self.token["<|assistant_end|>"]]

    def _prompt(self, text: str) -> list[int]:
        if not self.ids:
            return render_prompt(
                self.engine.tokenizer, {"messages": [*self.messages, {"role": "user", "content": text}]}
            )
        start, end, answer = (self.token[name] for name in ("<|user_start|>", "<|user_end|>", "<|assistant_start|>"))
        return [*self.ids, start, *encode_plain(self.engine.tokenizer, text), end, answer]

    def _pieces(self, stream: Iterable[int], answer: list[int]) -> Iterator[Piece]:
        """Decode a stream of ids, which also go into `answer`."""
        pieces = Pieces(self.engine.tokenizer)
        for token in stream:
            answer.append(token)
            yield from pieces.feed(token)
        yield from pieces.rest()

    def _whole(self, answer: list[int]) -> list[int]:
        """`answer` without a tool call that was cut off before its end, or before the end of its output."""
        call, opened = len(answer), None
        for place, token in enumerate(answer):
            if token in self.opening:
                opened = self.opening[token]
                call = place if opened == "python" else call
            elif token in self.closing:
                opened = None
        return answer if opened is None else answer[:call]


def show(pieces: Iterable[Piece], marks: Sequence[str] = ("[", " → ", "]")) -> Iterator[str]:
    """(kind, piece) … → pieces of text, with tool calls between marks: "so ", "[", "3*4", " → ", "12", "]", " cats"."""
    before, (start, between, end) = "text", marks
    for kind, piece in pieces:
        if kind != before:
            if before != "text" and not (before == "python" and kind == "python_output"):
                yield end
            if kind == "python_output" and before == "python":
                yield between
            elif kind != "text":
                yield start
            before = kind
        yield piece
    if before != "text":
        yield end
