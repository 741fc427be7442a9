"""The thread that owns the model: it runs the engine's steps and hands each stream its new tokens."""

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanochat_hf.generation import Continuous, Event, Request

from .errors import ApiError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """New tokens of one sample of one of a stream's requests.

    A sample that is `done` is `finished` where it met an end token; else it has max_new_tokens.
    """

    request: int
    sample: int
    ids: Sequence[int]
    log_probs: Sequence[float]
    top: Sequence[Sequence[tuple[int, float]]]
    done: bool
    finished: bool


class Stream:
    """What a connection awaits: updates in the order in which they came. Belongs to the event loop's thread."""

    def __init__(self, scheduler: "Scheduler") -> None:
        self.scheduler, self.handles = scheduler, list[int]()
        self.updates: list[Update] = []
        self.error: ApiError | None = None
        self.closed = False
        self.news = asyncio.Event()

    def put(self, update: Update) -> None:
        """Add news."""
        self.updates.append(update)
        self.news.set()

    def fail(self, error: ApiError) -> None:
        """No more will come."""
        self.error = error
        self.news.set()

    def close(self) -> None:
        """The client has gone, or has enough; what still runs is cancelled."""
        if not self.closed:
            self.closed = True
            self.news.set()
            self.scheduler.cancel(self)

    async def next(self) -> list[Update]:
        """All news since the last call, at least one; none once closed. ApiError where the engine failed."""
        await self.news.wait()
        self.news.clear()
        updates, self.updates = self.updates, []
        if self.error and not updates:
            raise self.error
        return [] if self.closed else updates


@dataclass
class _Running:
    # one of the engine's requests
    stream: Stream
    number: int  # of the request within its stream
    loop: asyncio.AbstractEventLoop
    left: int  # samples that are not over


class Scheduler:
    """Runs `engine` on a thread of its own, for streams of any event loop.

    At most `waiting` samples wait beyond those in rows; a request for more is refused with 429.
    """

    def __init__(self, engine: Continuous, waiting: int = 64) -> None:
        self.engine, self.most = engine, engine.rows + waiting
        self.changed = threading.Condition()
        self.commands: list[tuple[Callable[[], None], int]] = []  # each with the samples that it begins
        self.running: dict[int, _Running] = {}  # by the engine's handle; only the thread looks at it
        self.busy = 0  # samples in the engine, as of its last step
        self.stopping = False
        self.thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        """Begin."""
        self.thread.start()

    def stop(self) -> None:
        """End, with an error for all that runs."""
        with self.changed:
            self.stopping = True
            self.changed.notify()
        self.thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are served."""
        return self.thread.is_alive() and not self.stopping

    @property
    def load(self) -> int:
        """Samples that run or wait."""
        return self.busy + sum(samples for _, samples in self.commands)

    def submit(self, requests: Sequence[Request]) -> Stream:
        """Queue the requests of one connection; ApiError 429 where too many wait, 503 where nothing is served."""
        samples = sum(request.num_samples for request in requests)
        stream, loop = Stream(self), asyncio.get_running_loop()

        def begin() -> None:
            for number, request in enumerate(requests):
                try:
                    handle = self.engine.submit(request)
                except ValueError as error:  # what the caller should have found; the thread must go on
                    _call(loop, functools.partial(stream.fail, ApiError(400, str(error))))
                    return
                stream.handles.append(handle)
                self.running[handle] = _Running(stream, number, loop, request.num_samples)

        with self.changed:
            if not self.alive:
                raise ApiError(503, "the server is shutting down; try again later", code="unavailable")
            if self.load + samples > self.most:
                message = f"{self.load} answers run or wait, at most {self.most} may; try again later"
                raise ApiError(429, message, code="queue_full")
            self.commands.append((begin, samples))
            self.changed.notify()
        return stream

    def cancel(self, stream: Stream, request: int | None = None, sample: int | None = None) -> None:
        """Drop a stream's samples, or one of them."""

        def drop() -> None:
            for number, handle in enumerate(stream.handles):
                if request in (None, number):
                    self.engine.cancel(handle, sample)
                    self._over(handle, None if sample is None else 1)

        with self.changed:
            self.commands.append((drop, 0))
            self.changed.notify()

    def _over(self, handle: int, samples: int | None) -> None:
        # so many samples of a request are over, or all
        one = self.running.get(handle)
        if one:
            one.left -= one.left if samples is None else samples
            if one.left <= 0:
                del self.running[handle]

    def _run(self) -> None:
        while True:
            with self.changed:
                while not self.commands and self.engine.idle and not self.stopping:
                    self.changed.wait()
                if self.stopping:
                    break
                for command, _ in self.commands:
                    command()
                self.commands = []
                self.busy = self.engine.running + self.engine.queued
            try:
                events = self.engine.step()
            except Exception:
                # an engine that failed once may serve the next request; who waits must hear of it
                log.exception("a step of the engine failed")
                self._fail(ApiError(500, "the model failed; the server's log says why"))
                events = []
            self._deliver(events)
            self.busy = self.engine.running + self.engine.queued
        self._fail(ApiError(503, "the server is shutting down", code="unavailable"))

    def _deliver(self, events: Sequence[Event]) -> None:
        """Hand over one step's events, with one call for each event loop."""
        news: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Update]]] = {}
        for event in events:
            one = self.running.get(event.handle)
            if one is None:
                continue
            out, start = event.completion, event.start
            parts = out.ids[start:], out.log_probs[start:], out.top[start:]
            update = Update(one.number, event.sample, *parts, done=event.done, finished=out.finished)
            news.setdefault(one.loop, []).append((one.stream, update))
            if event.done:
                self._over(event.handle, 1)
        for loop, items in news.items():
            _call(loop, lambda items=items: [stream.put(update) for stream, update in items])

    def _fail(self, error: ApiError) -> None:
        self.engine.clear()
        streams = {id(one.stream): one for one in self.running.values()}
        self.running.clear()
        for one in streams.values():
            _call(one.loop, lambda stream=one.stream: stream.fail(error))


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    """Have the loop's thread call `function`; nothing where the loop has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function)
