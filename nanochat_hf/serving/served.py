"""What is served: the model's name, its tokenizer, and the defaults of requests."""

import copy
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from nanochat_hf.generation import Continuous, Request

from .errors import too_long
from .fields import Fields
from .writing import special_ids

CHARACTERS_A_TOKEN = 16  # a text with more characters for each position is refused before it is tokenised


@dataclass(frozen=True)
class Sampling:
    """The fields that both endpoints share."""

    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int | str
    n: int


class Served:
    """One model under a name.

    `max_new_tokens` is the length of an answer where a request names none, `seed` where requests without a seed begin.
    """

    def __init__(self, name: str, engine: Continuous, max_new_tokens: int = 256, seed: int = 0) -> None:
        self.name, self.length, self.vocabulary = name, engine.length, engine.model.config.vocab_size
        self.max_new_tokens, self.most_samples = max_new_tokens, engine.rows
        # a copy, because the engine's is used on another thread and encoding changes its state
        self.tokenizer: PreTrainedTokenizerBase = copy.deepcopy(engine.tokenizer)
        self.seed, self.count, self.created = seed, itertools.count(), int(time.time())
        self.special, self.bytes = special_ids(self.tokenizer), _bytes_of_letters()

    def sampling(self, fields: Fields) -> Sampling:
        """How a request samples; temperature is 1 where it is not given, as with OpenAI."""
        top_p, top_k = fields.number("top_p", 0, 1, 1.0), fields.whole("top_k", 0, None, None)
        seed = fields.whole("seed", -(2**63), 2**63 - 1, None)
        n = fields.whole("n", 1, self.most_samples, 1)
        assert n is not None
        return Sampling(
            fields.number("temperature", 0, 2, 1.0),
            # at 0 OpenAI's API takes the likeliest token alone; the least nucleus does the same
            max(top_p, 1e-9) if top_p < 1 else None,
            top_k or None,
            f"{self.seed} {next(self.count)}" if seed is None else seed,
            n,
        )

    def check_characters(self, text: int, param: str) -> None:
        """Refuse a text of so many characters that no tokenizer makes it fit."""
        if text > self.length * CHARACTERS_A_TOKEN:
            raise too_long(
                f"{param} has {text:,} characters; this model's maximum context length is {self.length:,} tokens", param
            )

    def request(self, prompt: Sequence[int], wanted: int | None, param: str, **settings: Any) -> Request:
        """The engine's request; ApiError where prompt and answer do not fit the model."""
        room = self.length - len(prompt)
        if room < (wanted or 1):
            asked = f" and {wanted:,} for the answer" if wanted else ""
            raise too_long(
                f"This model's maximum context length is {self.length:,} tokens. However, you requested "
                f"{len(prompt):,} tokens in the {param}{asked}. Please shorten one of them.",
                param,
            )
        return Request(prompt, max_new_tokens=wanted or min(room, self.max_new_tokens), **settings)

    def raw(self, token: int) -> bytes:
        """The bytes of a token."""
        text = self.tokenizer.convert_ids_to_tokens(token)
        assert isinstance(text, str)
        if token in self.special or not all(letter in self.bytes for letter in text):
            return text.encode()
        return bytes(self.bytes[letter] for letter in text)


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Counts of tokens, as the API gives them."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _bytes_of_letters() -> dict[str, int]:
    """The letters with which byte-level tokenizers spell bytes, GPT-2's: printable bytes stand for themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet())
    return table
