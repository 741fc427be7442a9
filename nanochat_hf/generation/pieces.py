"""Ids of an answer → pieces of text, as they come."""

from transformers import PreTrainedTokenizerBase

from ..conversation import PARTS
from .tools import decode

LONGEST_CHARACTER = 4  # bytes in UTF-8, and so the most tokens of which none is a whole character

Piece = tuple[str, str]  # kind (text, python or python_output) and text


class Pieces:
    """Decodes one answer token by token, into whole characters; calls and their outputs are pieces of other kinds."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        vocabulary = tokenizer.get_vocab()
        self.tokenizer = tokenizer
        self.opening = {vocabulary[marks[0]]: kind for kind, marks in PARTS.items() if marks}
        self.closing = {vocabulary[marks[1]] for marks in PARTS.values() if marks}
        self.kind, self.pending = "text", list[int]()

    def feed(self, token: int) -> list[Piece]:
        """The pieces that this token completes, none or one."""
        if token in self.opening or token in self.closing:
            pieces = self.rest()
            self.kind = self.opening.get(token, "text")
            return pieces
        self.pending.append(token)
        piece = decode(self.tokenizer, self.pending)
        # An unfinished character waits for its other bytes, but not for ever: some bytes never become one.
        if piece.endswith("\ufffd") and len(self.pending) <= LONGEST_CHARACTER:
            return []
        self.pending = []
        return [(self.kind, piece)]

    def rest(self) -> list[Piece]:
        """What still waited for its other bytes."""
        piece = [(self.kind, decode(self.tokenizer, self.pending))] if self.pending else []
        self.pending = []
        return piece
