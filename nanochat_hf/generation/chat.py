"""A conversation with a model, kept as the very ids that it read and wrote: text rendered again may get other tokens."""

from ..conversation import PARTS, encode_plain, render, render_prompt
from .sampling import check_sampling
from .tools import answer_parts

LONGEST_CHARACTER = 4  # bytes of UTF-8, so tokens of which none is a whole character


class Chat:
    """Turns of one conversation: `messages` as conversation.py has them, `ids` from bos to the last assistant_end.

    `settings`: max_new_tokens, temperature, top_k, top_p. Turn n samples with seed + n, so the same questions get the same answers.
    """

    def __init__(self, engine, *, system=None, seed=0, **settings):
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

    def clear(self, system=None):
        """Begin anew, with the system message `system` or none."""
        self.messages = [{"role": "system", "content": system}] if system else []
        self.ids = []

    def replay(self, messages):
        """Take these messages as the conversation so far."""
        self.messages = list(messages)
        self.ids = render(self.engine.tokenizer, {"messages": self.messages})[0]

    def ask(self, text):
        """Yield the answer as it comes: (kind, piece) with kind text, python or python_output; pieces are whole characters.

        However it ends, also closed or interrupted, the conversation holds the question and what of the answer is whole: a tool call that
        was cut off is left out. ValueError when the conversation does not fit the positions of the model.
        """
        prompt = self._prompt(text)
        positions = getattr(self.engine.model.config, "max_position_embeddings", None)
        room = self.settings.get("max_new_tokens", 256) if positions is None else positions - len(prompt)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens, the model sees {positions}; begin anew with /clear, or ask something shorter"
            )
        settings = self.settings | {"max_new_tokens": min(self.settings.get("max_new_tokens", 256), room)}
        answer, turn = [], len(self.messages) // 2
        try:
            yield from self._pieces(self.engine.stream(prompt, seed=self.seed + turn, **settings), answer)
        finally:
            answer = self._whole(answer)
            self.messages.append({"role": "user", "content": text})
            self.messages.append({"role": "assistant", "content": answer_parts(self.engine.tokenizer, answer)})
            self.ids = [*prompt, *answer, self.token["<|assistant_end|>"]]

    def _prompt(self, text):
        if not self.ids:
            return render_prompt(
                self.engine.tokenizer, {"messages": [*self.messages, {"role": "user", "content": text}]}
            )
        start, end, answer = (self.token[name] for name in ("<|user_start|>", "<|user_end|>", "<|assistant_start|>"))
        return [*self.ids, start, *encode_plain(self.engine.tokenizer, text), end, answer]

    def _pieces(self, stream, answer):
        """Decode a stream of ids, which also go into `answer`."""
        kind, pending, decode = "text", [], self.engine.tokenizer.decode
        for token in stream:
            answer.append(token)
            if token in self.opening or token in self.closing:
                if pending:
                    yield kind, decode(pending)
                kind, pending = self.opening.get(token, "text"), []
                continue
            pending.append(token)
            piece = decode(pending)
            # an unfinished character waits for its other bytes; bytes that will never be one do not wait for ever
            if not piece.endswith("\ufffd") or len(pending) > LONGEST_CHARACTER:
                yield kind, piece
                pending = []
        if pending:
            yield kind, decode(pending)

    def _whole(self, answer):
        """`answer` without a tool call that was cut off before its end, or before the end of its output."""
        call, opened = len(answer), None
        for place, token in enumerate(answer):
            if token in self.opening:
                opened = self.opening[token]
                call = place if opened == "python" else call
            elif token in self.closing:
                opened = None
        return answer if opened is None else answer[:call]


def show(pieces, marks=("[", " → ", "]")):
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
