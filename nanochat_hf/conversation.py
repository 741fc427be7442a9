"""Conversations: validation, rendering to ids and loss mask, and the chat template that says the same to transformers."""

import hashlib
import json
from itertools import chain
from os.path import commonprefix
from pathlib import Path

import numpy as np

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

# The kinds of an assistant's parts, and the special tokens around each
PARTS = {
    "text": None,
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}

# What the assistant says is collected in ns.run and marked in one piece, which ends in a special token wherever it can: transformers marks by
# characters, and of a last character that takes several tokens it marks only the first. ns.text holds adjacent text parts, which are one text.
# ns.next is what may come: user, assistant, tool (a call is open), or more (the tool answered, the same turn goes on).
# The file's lines are joined without their indentation, so that none of it reaches the model.
CHAT_TEMPLATE = "".join(
    line.strip() for line in Path(__file__).with_name("chat_template.jinja").read_text("utf-8").splitlines()
)


class ConversationError(ValueError):
    """A conversation that cannot be rendered; the message says where and why."""


def validate(conversation, where="conversation"):
    """Check roles and contents; ConversationError names `where`, the fault and the remedy."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ConversationError(f"{where}: no messages; give {{'messages': [{{'role', 'content'}}, …]}}")
    turns = messages[1:] if isinstance(messages[0], dict) and messages[0].get("role") == "system" else messages
    if turns is not messages and not isinstance(messages[0].get("content"), str):
        raise ConversationError(
            f"{where}: the system message has content of type {type(messages[0].get('content')).__name__}; give text"
        )
    for i, message in enumerate(turns):
        role, expected = message.get("role") if isinstance(message, dict) else None, ("user", "assistant")[i % 2]
        if role != expected:
            raise ConversationError(
                f"{where}: turn {i + 1} has role {role!r}, must be {expected!r} (user and assistant alternate)"
            )
        content = message.get("content")
        if role == "assistant" and isinstance(content, list):
            wrong = next((part for part in content if not _is_part(part)), None)
            if wrong is not None or not content:
                raise ConversationError(
                    f"{where}: turn {i + 1} has the part {wrong!r:.80}; parts are {{'type': {' | '.join(PARTS)}, 'text'}}"
                )
        elif not isinstance(content, str):
            raise ConversationError(
                f"{where}: turn {i + 1} has content of type {type(content).__name__}; give text (or parts of an assistant)"
            )
    if not turns:
        raise ConversationError(f"{where}: only a system message; add a user's message")


def _is_part(part):
    return (
        isinstance(part, dict)
        and isinstance(part.get("type"), str)
        and part["type"] in PARTS
        and isinstance(part.get("text"), str)
    )


def encode_plain(tokenizer, text):
    """Ids of `text`, in which the strings of special tokens are ordinary text."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    try:
        return backend.encode(text, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = False


class PlainEncoder:
    """A private copy of a tokenizer to which every string is text, special tokens' included; safe beside other threads' use of the
    original, and picklable (tokenizers itself forgets the setting). `fingerprint` changes with the vocabulary and the template."""

    def __init__(self, tokenizer):
        self.special = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
        self._load(tokenizer.backend_tokenizer.to_str())

    def _load(self, text):
        from tokenizers import Tokenizer

        self.backend, self.joined = Tokenizer.from_str(text), Tokenizer.from_str(text)
        for backend in (self.backend, self.joined):
            backend.no_truncation()
            backend.no_padding()
        self.backend.encode_special_tokens, self.joined.encode_special_tokens = True, False
        self.strings = [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]
        self.prefix = commonprefix(self.strings)  # one search instead of nine

    def __getstate__(self):
        return {"special": self.special, "text": self.backend.to_str()}

    def __setstate__(self, state):
        self.special = state["special"]
        self._load(state["text"])

    @property
    def fingerprint(self):
        """Hex digest of all that decides which ids and mask a conversation gets."""
        return hashlib.sha256(json.dumps([self.backend.to_str(), CHAT_TEMPLATE, self.special]).encode()).hexdigest()

    def encode(self, texts):
        """encode(["hi", "you"]) → a list of ids for each text, without special tokens."""
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def render(self, conversations):
        """Many conversations at once → (ids int32, mask uint8, lengths): `render` of each, one behind the other, in flat arrays.

        A conversation is encoded as one string whose special tokens the tokenizer cuts out itself, a third faster than piece by piece; where a text
        holds the string of a special token, piece by piece.
        """
        layouts = [list(layout(c)) for c in conversations]
        if any(self._holds_special(piece) for pieces in layouts for piece, special, _ in pieces if not special):
            return self._render_pieces(layouts)
        texts = ["".join(piece for piece, _, _ in pieces) for pieces in layouts]
        encoded = [e.ids for e in self.joined.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        ids = np.fromiter(chain.from_iterable(encoded), dtype=np.int32, count=int(lengths.sum()))
        return ids, self._mask(ids), lengths

    def _holds_special(self, text):
        return self.prefix in text and any(s in text for s in self.strings)

    def _mask(self, ids):
        """Learned are the tokens behind assistant_start up to assistant_end, but for output_start to output_end."""

        def within(name):
            start, end = (ids == self.special[f"<|{name}_{side}|>"] for side in ("start", "end"))
            return start, (np.cumsum(start, dtype=np.int32) > np.cumsum(end, dtype=np.int32)) | end

        (begins, said), (_, output) = within("assistant"), within("output")
        return (said & ~begins & ~output).astype(np.uint8)

    def _render_pieces(self, layouts):
        encoded = iter(self.encode([piece for pieces in layouts for piece, special, _ in pieces if not special]))
        ids, sizes, trained, lengths = [], [], [], []
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


def layout(conversation):
    """The pieces of a valid conversation, in order: (special token's name or text, whether it is special, whether it is learned)."""
    messages = conversation["messages"]
    system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
    yield "<|bos|>", True, 0
    for i, message in enumerate(messages[1:] if system else messages):
        if message["role"] == "user":
            yield "<|user_start|>", True, 0
            yield (system if i == 0 else "") + message["content"], False, 0
            yield "<|user_end|>", True, 0
            continue
        yield "<|assistant_start|>", True, 0
        for kind, text in _merged(message["content"]):
            learned = int(kind != "python_output")
            if PARTS[kind]:
                yield PARTS[kind][0], True, learned
            yield text, False, learned
            if PARTS[kind]:
                yield PARTS[kind][1], True, learned
        yield "<|assistant_end|>", True, 1


def render(tokenizer, conversation, max_tokens=None):
    """Conversation → (ids, mask), equally long; mask is 1 where the model is to learn, that is on the assistant's own tokens."""
    validate(conversation)
    ids, mask = [], []
    for piece, special, learned in layout(conversation):
        tokens = [tokenizer.convert_tokens_to_ids(piece)] if special else encode_plain(tokenizer, piece)
        ids += tokens
        mask += [learned] * len(tokens)
    return ids[:max_tokens], mask[:max_tokens]


def _merged(content):
    if isinstance(content, str):
        return [("text", content)]
    parts = []
    for part in content:
        if parts and part["type"] == "text" == parts[-1][0]:
            parts[-1] = ("text", parts[-1][1] + part["text"])
        else:
            parts.append((part["type"], part["text"]))
    return parts


def render_prompt(tokenizer, conversation):
    """Ids up to and including assistant_start: the last assistant message, if any, is dropped."""
    validate(conversation)
    messages = conversation["messages"]
    messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return [*render(tokenizer, {"messages": messages})[0], tokenizer.convert_tokens_to_ids("<|assistant_start|>")]
