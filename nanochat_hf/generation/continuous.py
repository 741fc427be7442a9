"""Continuous batching: a fixed number of rows, and a row that ends makes room for the next request.

    engine = Continuous(model, tokenizer, rows=32, length=1024)
    engine.run([Request(prompt, max_new_tokens=64, num_samples=4), …])      # completions, in the requests' order

or step by step, as a server does:

    handle = engine.submit(Request(prompt, temperature=1.0, seed=7))
    while not engine.idle:
        for event in engine.step():
            event.handle, event.sample, event.ids, event.done, event.completion

A prompt is read once, however many samples it has, and copied into a row for each. Rows lie side by side in one cache,
each at its own position, so nothing waits for the longest prompt or answer. Which row a request runs in follows from
the requests and the tokens alone, never from the clock.
"""

from collections import deque
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nanochat_hf.tools.calculator import calculate

from .requests import IDLE, Event, Job, Live, Request
from .row_cache import read
from .row_table import Draw, Groups, RowTable
from .sampling import row_uniforms
from .static import STEPS
from .tools import Calculator, Completion, Row, decode, special_ids

PREFILL = 2048  # tokens of prompts that are read in one pass, padding included; a longer prompt is read alone
BLOCK = 64  # without compilation the rows see a multiple of this many positions, so that views last a while
HALVINGS = 3  # compiled shapes: all rows, half, a quarter, an eighth; the smallest that holds the rows in use runs


class Continuous:
    """Generates for any number of requests in a fixed number of rows of `length` positions each.

    `length` (default: the model's positions) bounds prompt and answer together. The cache takes
    2 · layers · rows · length · key/value heads · head width numbers; without `compile` it begins small and grows.
    Models of transformers are served where their layers keep keys and values alone, with attention sdpa or eager;
    others raise ValueError. The calculator is as in `Engine`.

    `compile` compiles the step for all rows, and for half, a quarter and an eighth of them where fewer are in use. On
    CUDA a step is then a graph, STEPS of them between two looks of the host, as long as all rows draw in the same way
    and none asks for `top`.

    The weights are read at every step: change them only while `idle`. Not safe for threads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        calculator: Calculator | None = calculate,
        *,
        rows: int = 32,
        length: int | None = None,
        compile: bool = False,
    ) -> None:
        length = length or getattr(model.config, "max_position_embeddings", None)
        if not length or length < 2 or rows < 1:
            raise ValueError(f"rows={rows}, length={length}: at least 1 row of 2 positions; give rows= and length=")
        self.model, self.tokenizer, self.calculator, self.rows, self.length = model, tokenizer, calculator, rows, length
        self.specials = special_ids(tokenizer)
        call_end = self.specials[0]["<|python_end|>"] if calculator else None
        self.table = RowTable(model, rows, length, call_end, sorted(self.specials[1]))
        if compile:
            self.table.compile()
        # tokens between two looks of the host, and tokens of prompts in one pass
        self.steps, self.prefill = STEPS if compile and model.device.type == "cuda" else 1, PREFILL
        self.waiting: deque[Job] = deque()
        self.live: list[Live | None] = []
        self.submitted = 0

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self.waiting and not self.running

    @property
    def running(self) -> int:
        """Samples in rows."""
        return sum(live is not None for live in self.live)

    @property
    def queued(self) -> int:
        """Samples that wait for a row."""
        return sum(len(job.samples) for job in self.waiting)

    def submit(self, request: Request) -> int:
        """Queue a request → its handle; ValueError where prompt and answer do not fit a row."""
        prompt, most = len(request.prompt), request.max_new_tokens
        if prompt + most > self.length:
            raise ValueError(
                f"a prompt of {prompt} tokens and max_new_tokens={most} need {prompt + most} positions, a row has "
                f"{self.length}; shorten one of them or give the engine a larger length"
            )
        handle, self.submitted = self.submitted, self.submitted + 1
        self.waiting.append(Job(handle, request, deque(range(request.num_samples))))
        return handle

    def cancel(self, handle: int, sample: int | None = None) -> None:
        """Drop one sample of a request, or all; their rows are free at once, and no event follows."""

        def meant(which: int) -> bool:
            return sample is None or sample == which

        self.live = [None if a and a.handle == handle and meant(a.sample) else a for a in self.live]
        for job in [job for job in self.waiting if job.handle == handle]:
            job.samples = deque(j for j in job.samples if not meant(j))
            if not job.samples:
                self.waiting.remove(job)

    def clear(self) -> None:
        """Drop everything."""
        self.waiting.clear()
        self.live = []

    def run(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """For each request its samples, in order, whichever ended first. Only while `idle`."""
        if not self.idle:
            raise ValueError("run needs an engine without other requests; use submit and step beside them")
        handles = [self.submit(request) for request in requests]
        done: dict[tuple[int, int], Completion] = {}
        while not self.idle:
            done.update(((e.handle, e.sample), e.completion) for e in self.step() if e.done)
        return [[done[h, j] for j in range(r.num_samples)] for h, r in zip(handles, requests, strict=True)]

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Let waiting samples into free rows and decode one token for each row (on CUDA up to STEPS) → events."""
        self._admit()
        self._close_ranks()
        live = [one for one in self.live if one is not None]
        if not live:
            return []
        # the likeliest tokens are taken from the logits, which a graph does not hand out
        look = any(one.request.top for one in live)
        steps = 1 if look else self.steps
        rows, positions = self._shape(live, steps)
        self.table.load([one.state(steps) for one in live] + [IDLE] * (rows - len(live)))
        self.table.run(rows, positions, steps, self._groups(live, rows), replay=not look)
        tokens, scores = (t[: len(live), :steps].tolist() for t in (self.table.out, self.table.scores))
        events = []
        for place, one in enumerate(live):
            start = len(one.row.out.ids)
            self._take(one, tokens[place], scores[place], self._top(one, place))
            if one.row.done:
                one.row.out.text = decode(self.tokenizer, one.row.out.ids)
                self.live[place] = None
            events.append(Event(one.handle, one.sample, start, one.row.out, one.row.done))
        return events

    def _take(self, one: Live, tokens: list[int], scores: list[float], top: list[tuple[int, float]]) -> None:
        """Give a row its tokens; those from −1 on were not for it, because it waits."""
        out, request = one.row.out, one.request
        for token, score in zip(tokens, scores, strict=True):
            if token < 0 or one.row.done:
                return
            forced = bool(one.row.pending)
            one.row.take(token)
            if request.log_probs:
                out.log_probs.append(0.0 if forced else score)
            if request.top:
                out.top.append([] if forced else top)

    def _admit(self) -> None:
        """Fill the free rows, in the order of the queue."""
        free = [place for place, one in enumerate(self.live) if one is None]
        free += range(len(self.live), self.rows)
        for place in free:
            if not self.waiting:
                return
            job = self.waiting[0]
            if job.prefix is None:
                self._read()
            self._begin(job, place)
            if not job.samples:
                self.waiting.popleft()

    def _read(self) -> None:
        """Read the first prompt of the queue, and those after it that fit into the same pass."""
        jobs: list[Job] = []
        longest = 0
        for job in self.waiting:
            if job.prefix is not None:
                continue
            longest = max(1, longest, len(job.request.prompt) - 1)
            if jobs and longest * (len(jobs) + 1) > self.prefill:
                break
            jobs.append(job)
        # a prompt of one token has nothing to read ahead; its own token stands in, and is written again
        prefixes = read(self.model, [job.request.prompt[:-1] or job.request.prompt for job in jobs])
        for job, prefix in zip(jobs, prefixes, strict=True):
            job.prefix = prefix

    def _begin(self, job: Job, place: int) -> None:
        """Put the next sample of a request into a row."""
        request, sample = job.request, job.samples.popleft()
        assert job.prefix is not None
        self.table.reserve(job.prefix, min(self.length, -(-len(request.prompt) // BLOCK) * BLOCK))
        assert self.table.cache is not None
        self.table.cache.put(place, job.prefix)
        if request.temperature:
            drawn = row_uniforms(request.seed, 0, sample, request.max_new_tokens)
            self.table.uniforms[place, : len(drawn)] = drawn.to(self.table.uniforms.device)
        calculator = self.calculator if request.calculate else None
        row = Row(self.tokenizer, calculator, self.specials, request.max_new_tokens)
        self.live += [None] * (place + 1 - len(self.live))
        self.live[place] = Live(job.handle, sample, request, row)

    def _close_ranks(self) -> None:
        """Move the last rows into free places, so that the rows in use are the first ones."""
        for place in range(len(self.live)):
            while self.live and self.live[-1] is None:
                self.live.pop()
            if place >= len(self.live):
                return
            if self.live[place] is None:
                one = self.live.pop()
                assert one is not None and self.table.cache is not None
                self.table.cache.move(len(self.live), place, one.position)
                self.table.uniforms[place] = self.table.uniforms[len(self.live)]
                self.live[place] = one

    def _shape(self, live: list[Live], steps: int) -> tuple[int, int]:
        """(rows, positions) of the next steps."""
        if not self.table.compiled:
            positions = min(self.length, -(-(max(one.position for one in live) + steps) // BLOCK) * BLOCK)
            assert self.table.cache is not None
            self.table.reserve([], positions)
            return len(live), positions
        shapes = [-(-self.rows // 2**halved) for halved in range(HALVINGS + 1)]
        return min(rows for rows in shapes if rows >= len(live)), self.length

    def _groups(self, live: list[Live], rows: int) -> Groups:
        """The ways to draw, each with its rows; rows that are not in use draw like the first."""
        places: dict[Draw, list[int]] = {}
        for place, one in enumerate(live):
            places.setdefault(one.draw, []).append(place)
        if len(places) == 1:
            return [(live[0].draw, None)]
        places[live[0].draw] += range(len(live), rows)
        return [(draw, torch.tensor(members, device=self.model.device)) for draw, members in places.items()]

    def _top(self, one: Live, place: int) -> list[tuple[int, float]]:
        """The likeliest tokens of a row's last step, if it wants them."""
        if not one.request.top:
            return []
        assert self.table.logits is not None
        scores = one.draw.log_probs(self.table.logits[place])
        values, ids = scores.topk(min(one.request.top, len(scores)))
        return list(zip(ids.tolist(), values.tolist(), strict=True))
