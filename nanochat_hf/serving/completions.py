"""/v1/completions: a text or ids go on; no messages, no tools."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nanochat_hf.generation import Request
from nanochat_hf.generation.tools import decode

from .errors import bad
from .fields import Fields
from .served import Served
from .writing import Token, Writer, Written

KNOWN = frozenset(
    "echo logprobs max_tokens model n prompt seed stop stream stream_options temperature top_k top_p".split()
)
MOST_TOP = 5  # of logprobs
NEW_TOKENS = 16  # where a request names none, OpenAI's default
PROMPTS = 64  # of one request


@dataclass(frozen=True)
class Completions:
    """A request for texts that go on; the same methods as `chat.Chat`."""

    served: Served
    requests: Sequence[Request]
    stream: bool
    usage: bool
    stops: Sequence[str]
    echo: bool
    log_probs: bool

    kind: ClassVar[str] = "text_completion"
    chunk_kind: ClassVar[str] = "text_completion"
    id_prefix: ClassVar[str] = "cmpl-"

    def writer(self, request: int) -> Writer:
        """What reads one sample's tokens."""
        return Writer(self.served.tokenizer, self.stops, plain=True)

    def first(self, request: int) -> dict[str, Any] | None:
        """A choice's first chunk, none without echo."""
        return {"text": self._prompt(request), "logprobs": None} if self.echo else None

    def piece(self, written: Written) -> dict[str, Any]:
        """A choice's next chunk."""
        return {"text": written.text} | self._scored(written.tokens, written.start)

    def whole(self, writer: Writer, tokens: Sequence[Token], request: int) -> dict[str, Any]:
        """A choice, at once."""
        return {"text": (self._prompt(request) if self.echo else "") + writer.text} | self._scored(tokens, 0)

    def reason(self, writer: Writer, finished: bool) -> str:
        """Why a choice ended."""
        return "stop" if finished or writer.stopped else "length"

    def _prompt(self, request: int) -> str:
        served = self.served
        return decode(served.tokenizer, [i for i in self.requests[request].prompt if i not in served.special])

    def _scored(self, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        if not self.log_probs:
            return {"logprobs": None}
        texts = [self._text(token.id) for token in tokens]
        offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
        return {
            "logprobs": {
                "tokens": texts,
                "token_logprobs": [token.log_prob for token in tokens],
                "top_logprobs": [{self._text(i): value for i, value in reversed(token.top)} for token in tokens],
                "text_offset": offsets,
            }
        }

    def _text(self, token: int) -> str:
        return self.served.raw(token).decode(errors="replace")


def parse(fields: Fields, served: Served) -> Completions:
    """A request's fields → what runs; ApiError for what cannot be."""
    fields.know(KNOWN)
    sampling, stream, echo = served.sampling(fields), fields.flag("stream"), fields.flag("echo")
    wanted, top = fields.whole("max_tokens", 1, None, NEW_TOKENS), fields.whole("logprobs", 0, MOST_TOP, None)
    if echo and top is not None:
        raise bad("logprobs", "logprobs of an echoed prompt are not supported; leave out echo or logprobs")
    usage = fields.usage_wanted(stream)
    requests = [
        served.request(
            prompt,
            wanted,
            "prompt",
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
            num_samples=sampling.n,
            log_probs=top is not None,
            top=top or 0,
            calculate=False,
        )
        for prompt in _prompts(served, fields.given.get("prompt", ""))
    ]
    return Completions(served, requests, stream, usage, fields.stops(), echo, top is not None)


def _prompts(served: Served, given: Any) -> list[list[int]]:
    """The prompts' ids: a text, ids, or a list of either. Texts get bos, and may hold special tokens."""
    ids = isinstance(given, list) and bool(given) and all(type(i) is int for i in given)
    prompts = [given] if isinstance(given, str) or ids else given
    if not isinstance(prompts, list) or not prompts:
        raise bad("prompt", "prompt must be a text, a list of token ids, or a list of either")
    if len(prompts) > PROMPTS:
        raise bad("prompt", f"prompt has {len(prompts)} entries; at most {PROMPTS} are allowed")
    return [_prompt(served, prompt) for prompt in prompts]


def _prompt(served: Served, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        served.check_characters(len(prompt), "prompt")
        return served.tokenizer(prompt)["input_ids"]
    if not isinstance(prompt, list) or not prompt or not all(type(i) is int for i in prompt):
        raise bad("prompt", "prompt must be a text, a list of token ids, or a list of either")
    wrong = next((i for i in prompt if not 0 <= i < served.vocabulary), None)
    if wrong is not None:
        raise bad("prompt", f"prompt has the id {wrong}; the vocabulary has {served.vocabulary} tokens")
    return prompt
