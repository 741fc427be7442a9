"""Conversations → ids and loss mask, and the two templates that tell transformers the same.

messages.py has the order of the pieces; here they become tokens. `render` does one conversation, `PlainEncoder` many.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np

from .messages import PARTS, SPECIAL_TOKENS, ConversationError, Piece, layout, prompt_pieces, surrogate, validate

__all__ = [
    "CHAT_TEMPLATE",
    "PARTS",
    "RESPONSE_TEMPLATE",
    "SPECIAL_TOKENS",
    "ConversationError",
    "PlainEncoder",
    "encode_plain",
    "layout",
    "render",
    "render_prompt",
    "validate",
]

# The file's lines are joined without their indentation, so that none of it reaches the model. In it, ns.run collects
# what the assistant says and marks it in one piece, which ends in a special token wherever it can: transformers marks
# by characters, and of a last character that takes several tokens it marks only the first.
CHAT_TEMPLATE = "".join(
    line.strip() for line in Path(__file__).with_name("chat_template.jinja").read_text("utf-8").splitlines()
)

# An answer → a message with tool_calls, for `tokenizer.parse_response` and `transformers serve`. The first pattern is
# a call of a declared tool, NAME{ARGUMENTS}. The second is the calculator's bare code: its name is the "python" within
# the token itself, and its arguments are the code as a string, since a response template has no way to wrap it. It
# waits for a letter that no name has, or a streamed NAME{ would be taken for code.
RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": ["<|assistant_start|>", "<|output_end|>"],
    "fields": {
        "tool_calls": {
            "open_pattern": (
                r"<\|python_start\|>(?P<name>[a-zA-Z0-9_.:/-]+)(?=\{)"
                r"|<\|(?P<name>python)_start\|>(?=\{|[a-zA-Z0-9_.:/-]*[^a-zA-Z0-9_.:/{-])"
            ),
            "close": ["<|python_end|>", "<|assistant_end|>"],
            "repeats": True,
            "content": "json",
            "content_args": {"allow_non_json": True},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "tool_output": {"open": "<|output_start|>", "close": "<|output_end|>", "repeats": True},
        "content": {"close": "<|assistant_end|>", "repeats": True, "join": "", "content_args": {"strip": False}},
    },
}


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text`, in which the strings of special tokens are ordinary text."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    try:
        return backend.encode(text, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = False


def render(
    tokenizer: Any, conversation: Mapping[str, Any], max_tokens: int | None = None
) -> tuple[list[int], list[int]]:
    """A conversation → (ids, mask), equally long; mask is 1 on the tokens that the assistant is to learn, its own.

    It is {"messages": […], "tools": […] or absent}, see messages.py. ConversationError for what cannot be written.
    """
    ids, mask = _encode(tokenizer, layout(conversation))
    return ids[:max_tokens], mask[:max_tokens]


def render_prompt(tokenizer: Any, conversation: Mapping[str, Any]) -> list[int]:
    """Ids up to where the assistant goes on; the last assistant message, if any, is dropped."""
    return _encode(tokenizer, prompt_pieces(conversation))[0]


def _encode(tokenizer: Any, pieces: Iterable[Piece]) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    mask: list[int] = []
    for piece, special, learned in pieces:
        if fault := surrogate(piece):
            raise ConversationError(f"conversation: {fault}")
        tokens = [tokenizer.convert_tokens_to_ids(piece)] if special else encode_plain(tokenizer, piece)
        ids += tokens
        mask += [learned] * len(tokens)
    return ids, mask


class PlainEncoder:
    """A private copy of a tokenizer to which every string is text, special tokens' included.

    Other threads may use the original meanwhile, and it can be pickled (tokenizers itself forgets the setting).
    """

    def __init__(self, tokenizer: Any) -> None:
        self.special: dict[str, int] = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
        self._load(tokenizer.backend_tokenizer.to_str())

    def _load(self, text: str) -> None:
        from tokenizers import Tokenizer

        self.backend, self.joined = Tokenizer.from_str(text), Tokenizer.from_str(text)
        for backend in (self.backend, self.joined):
            backend.no_truncation()
            backend.no_padding()
        self.backend.encode_special_tokens, self.joined.encode_special_tokens = True, False
        self.strings = [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]
        self.prefix = commonprefix(self.strings)  # noqa: RUF071  of characters: one search instead of nine

    def __getstate__(self) -> dict[str, Any]:
        return {"special": self.special, "text": self.backend.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.special = state["special"]
        self._load(state["text"])

    @property
    def fingerprint(self) -> str:
        """Hex digest of what decides a conversation's ids and mask: it changes with vocabulary and template."""
        return hashlib.sha256(json.dumps([self.backend.to_str(), CHAT_TEMPLATE, self.special]).encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """A list of ids for each text, without special tokens."""
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def render(self, conversations: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Many conversations → (ids int32, mask uint8, lengths int64): `render` of each, in flat arrays.

        A conversation is encoded as one string whose special tokens the tokenizer cuts out itself, a third faster than
        piece by piece. Where a text holds the string of a special token, it goes piece by piece.
        """
        layouts = [list(layout(c)) for c in conversations]
        if any(self._holds_special(piece) for pieces in layouts for piece, special, _ in pieces if not special):
            return self._render_pieces(layouts)
        texts = ["".join(piece for piece, _, _ in pieces) for pieces in layouts]
        encoded = [e.ids for e in self.joined.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        ids = np.fromiter(chain.from_iterable(encoded), dtype=np.int32, count=int(lengths.sum()))
        return ids, self._mask(ids), lengths

    def _holds_special(self, text: str) -> bool:
        return self.prefix in text and any(s in text for s in self.strings)

    def _mask(self, ids: np.ndarray) -> np.ndarray:
        """What is learned, uint8 (T,): tokens after assistant_start, up to assistant_end, but for a tool's outputs.

        A conversation may end within a turn, after a call or its output; the next one's bos then ends the turn.
        """
        positions = np.arange(len(ids), dtype=np.int64)

        def latest(*names: str) -> np.ndarray:
            """For each position, the last one up to it that holds one of these tokens; -1 where there is none."""
            here = np.isin(ids, [self.special[name] for name in names])
            return np.maximum.accumulate(np.where(here, positions, -1)) if len(ids) else positions

        start, output = latest("<|assistant_start|>"), latest("<|output_start|>")
        # an end token itself belongs to what it ends, so ends count from the next position on
        end = np.concatenate(([-1], latest("<|assistant_end|>", "<|bos|>")))[: len(ids)]
        output_end = np.concatenate(([-1], latest("<|output_end|>")))[: len(ids)]
        said = (start > end) & (start < positions) & (ids != self.special["<|bos|>"])
        return (said & ~(output > output_end)).astype(np.uint8)

    def _render_pieces(self, layouts: list[list[Piece]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        encoded = iter(self.encode([piece for pieces in layouts for piece, special, _ in pieces if not special]))
        ids: list[int] = []
        sizes, trained, lengths = [], [], []
        for pieces in layouts:
            before = len(ids)
            for piece, special, learned in pieces:
                start = len(ids)
                if special:
                    ids.append(self.special[piece])
                else:
                    ids += next(encoded)
                sizes.append(len(ids) - start)
                trained.append(learned)
            lengths.append(len(ids) - before)
        return (
            np.array(ids, dtype=np.int32),
            np.repeat(np.array(trained, dtype=np.uint8), sizes),
            np.array(lengths, dtype=np.int64),
        )
