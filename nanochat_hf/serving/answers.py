"""From the scheduler's updates to what a client reads: one JSON object, or a stream of server-sent events."""

import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar, Protocol
from uuid import uuid4

from nanochat_hf.generation import Request

from .errors import ApiError
from .scheduler import Stream, Update
from .served import Served, usage
from .writing import Token, Writer, Written

Json = dict[str, Any]


class Asked(Protocol):
    """What a client wants, and how its endpoint writes it; chat.Chat and completions.Completions."""

    @property
    def served(self) -> Served:
        """The model."""
        ...

    @property
    def requests(self) -> Sequence[Request]:
        """What the engine runs."""
        ...

    @property
    def usage(self) -> bool:
        """Whether a stream ends with the count of tokens."""
        ...

    kind: ClassVar[str]  # of the answer, of a chunk of it, and how their ids begin
    chunk_kind: ClassVar[str]
    id_prefix: ClassVar[str]

    def writer(self, request: int) -> Writer:
        """What reads one sample's tokens."""
        ...

    def first(self, request: int) -> Json | None:
        """A choice's first chunk."""
        ...

    def piece(self, written: Written) -> Json:
        """A choice's next chunk."""
        ...

    def whole(self, writer: Writer, tokens: Sequence[Token], request: int) -> Json:
        """A choice, at once."""
        ...

    def reason(self, writer: Writer, finished: bool) -> str:
        """Why a choice ended."""
        ...


class Choice:
    """One sample of one request, which becomes one entry of `choices`."""

    def __init__(self, asked: Asked, request: int, index: int) -> None:
        self.request, self.index, self.writer = request, index, asked.writer(request)
        self.tokens: list[Token] = []
        self.read, self.over, self.finished = 0, False, False

    def take(self, update: Update) -> list[Written]:
        """The next tokens → what can be shown. The choice is `over` at their end, or where its writer stopped."""
        written = self.writer.feed(update.ids, update.log_probs, update.top)
        self.read += len(update.ids)
        if update.done or self.writer.stopped:
            self.over, self.finished = True, update.finished
            written += self.writer.end()
        self.tokens += [token for one in written for token in one.tokens]
        return written


class Answer:
    """All choices of what a client asked for."""

    def __init__(self, asked: Asked, stream: Stream) -> None:
        self.asked, self.stream = asked, stream
        samples = asked.requests[0].num_samples
        self.samples = samples
        self.choices = [Choice(asked, i // samples, i) for i in range(len(asked.requests) * samples)]
        self.head = {"id": asked.id_prefix + uuid4().hex, "created": int(time.time()), "model": asked.served.name}

    async def _updates(self) -> AsyncIterator[tuple[Choice, list[Written]]]:
        """What comes, until all choices are over or the stream is closed."""
        while not all(choice.over for choice in self.choices):
            updates = await self.stream.next()
            if not updates:
                return
            for update in _joined(updates):
                choice = self.choices[update.request * self.samples + update.sample]
                if choice.over:
                    continue
                written = choice.take(update)
                if choice.over and not update.done:
                    self.stream.scheduler.cancel(self.stream, update.request, update.sample)
                yield choice, written

    async def whole(self) -> Json:
        """The answer as one object, once it is complete."""
        async for _ in self._updates():
            pass
        asked = self.asked
        choices = [
            {
                "index": choice.index,
                **asked.whole(choice.writer, choice.tokens, choice.request),
                "finish_reason": asked.reason(choice.writer, choice.finished),
            }
            for choice in self.choices
        ]
        return {**self.head, "object": asked.kind, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events. An error after the first is an event too."""
        asked = self.asked
        try:
            for choice in self.choices:
                first = asked.first(choice.request)
                if first is not None:
                    yield self._event(choice, first, None)
            async for choice, written in self._updates():
                for one in written:
                    yield self._event(choice, asked.piece(one), None)
                if choice.over:
                    last = asked.piece(Written(0))
                    yield self._event(choice, last, asked.reason(choice.writer, choice.finished))
            if asked.usage:
                yield _line({**self.head, "object": asked.chunk_kind, "choices": [], "usage": self._usage()})
        except ApiError as error:
            yield _line(error.body)
        yield "data: [DONE]\n\n"

    def _event(self, choice: Choice, piece: Json, reason: str | None) -> str:
        one = {"index": choice.index, **piece, "finish_reason": reason}
        none = {"usage": None} if self.asked.usage else {}
        return _line({**self.head, "object": self.asked.chunk_kind, "choices": [one], **none})

    def _usage(self) -> Json:
        prompt = sum(len(request.prompt) for request in self.asked.requests)
        return usage(prompt, sum(choice.read for choice in self.choices))


def _joined(updates: Sequence[Update]) -> list[Update]:
    """Updates of the same sample as one, so that a connection that lags writes fewer events."""
    by_sample: dict[tuple[int, int], list[Update]] = {}
    for update in updates:
        by_sample.setdefault((update.request, update.sample), []).append(update)
    return [same[0] if len(same) == 1 else _one(same) for same in by_sample.values()]


def _one(updates: Sequence[Update]) -> Update:
    last = updates[-1]
    ids, log_probs = [i for u in updates for i in u.ids], [p for u in updates for p in u.log_probs]
    top = [t for u in updates for t in u.top]
    return Update(last.request, last.sample, ids, log_probs, top, done=last.done, finished=last.finished)


def _line(value: Json) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
