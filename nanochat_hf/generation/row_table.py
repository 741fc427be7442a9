"""One step of many rows, each at its own position, and on CUDA a graph of it.

Letters: N rows in use, R rows there are, S positions of a row, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .row_cache import Masks, Prefix, RowCache
from .sampling import sample
from .static import STEPS, allow_shapes

GRAPHS = 8  # CUDA graphs that are kept, one for each number of rows and each way to draw
# of a row's state, before the forced tokens: id, position, count, limit, stalled, and the id before, which smear needs
FIELDS = 6


class Draw(NamedTuple):
    """How a row's token is chosen, and whether its log-probability is wanted."""

    temperature: float
    top_k: int | None
    top_p: float | None
    scored: bool

    def __call__(self, logits: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, V), one number a row → ids (N,), and log-probabilities (N,) among all tokens (0 if unwanted)."""
        tokens = sample(logits, uniforms, self.temperature, self.top_k, self.top_p)
        if not self.scored:
            return tokens, torch.zeros_like(uniforms)
        return tokens, self.log_probs(logits).gather(1, tokens[:, None])[:, 0]

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (N, V) at the temperature; greedy rows at 1."""
        return (logits.float() / (self.temperature or 1.0)).log_softmax(-1)


Groups = Sequence[tuple[Draw, torch.Tensor | None]]  # a way to draw and its rows; None: all of them


def _forward(
    model: PreTrainedModel, masks: Masks, tokens: torch.Tensor, at: torch.Tensor, positions: int, cache: Cache
) -> torch.Tensor:
    """Logits (N, V) after one token a row. tokens (N, 2): the one before and the one to read; at (N, 1): its place."""
    before = {"previous_ids": tokens[:, :1]} if getattr(model.config, "smear", False) else {}
    mask = masks(at, positions)
    return model(
        input_ids=tokens[:, 1:], attention_mask=mask, position_ids=at, past_key_values=cache, use_cache=True, **before
    ).logits[:, -1]


class RowTable:
    """The state of R rows at fixed addresses, and the step that works on the first N of them.

    A row that waits for the host (its tool was called, or it is done) is stalled: it reads the same token at the same
    position again, which writes what is there already.

    `call_end` is the token after which a row waits, `ends` are the tokens that end it.
    """

    def __init__(self, model: PreTrainedModel, rows: int, length: int, call_end: int | None, ends: Sequence[int]):
        device = model.device
        self.model, self.masks, self.length, self.call_end = model, Masks(model), length, call_end
        self.cache: RowCache | None = None
        self.state = torch.zeros(rows, FIELDS + STEPS, dtype=torch.long, device=device)
        self.out = torch.full((rows, STEPS), -1, device=device)
        self.scores = torch.zeros(rows, STEPS, device=device)
        self.uniforms = torch.zeros(rows, length, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.ends = torch.tensor(ends, dtype=torch.long, device=device)
        self.logits: torch.Tensor | None = None  # of the last step that was not replayed
        self.forward, self.compiled = _forward, False
        self.viewed: tuple[tuple[int, int, int], Cache] | None = None
        self.graphs: dict[tuple[int, Draw], torch.cuda.CUDAGraph] = {}

    def compile(self) -> None:
        """From now on every number of rows is compiled, at full length; on CUDA a step becomes a graph."""
        allow_shapes()
        self.forward, self.compiled = torch.compile(_forward, fullgraph=True, dynamic=False), True

    def reserve(self, like: Prefix, positions: int) -> None:
        """Have room for so many positions a row; `like` gives the shapes of the first allocation."""
        if self.cache is None:
            self.cache = RowCache(like, len(self.state), self.length if self.compiled else positions)
        elif self.cache.positions < positions:
            self.cache.grow(min(self.length, max(positions, 2 * self.cache.positions)))

    def load(self, rows: Sequence[Sequence[int]]) -> None:
        """Set the state of the first rows: id, position, count, limit, stalled, id before, then STEPS forced or −1."""
        self.state[: len(rows)].copy_(torch.tensor(rows))
        self.column.zero_()

    @torch.no_grad()
    def run(self, rows: int, positions: int, steps: int, groups: Groups, *, replay: bool = True) -> None:
        """So many steps of the first `rows`, which see the first `positions`; results in `out` and `scores`.

        Without `replay` no graph is used, so `logits` are those of the last step.
        """
        ((draw, members), *others) = groups
        graph = None
        if replay and self.compiled and self.model.device.type == "cuda" and members is None and not others:
            graph = self.graphs.get((rows, draw)) or self._record(rows, draw)
        for _ in range(steps):
            if graph is not None:
                graph.replay()
            else:
                self._step(rows, positions, groups)

    def _step(self, rows: int, positions: int, groups: Groups) -> None:
        """Feed the ids, draw the next. With a single group nothing here asks the host, so CUDA can record it."""
        assert self.cache is not None
        state, forced = self.state[:rows], self.state[:rows, FIELDS:]
        ids, at, count, limit, stalled, before = state[:, :FIELDS].unbind(1)
        tokens, cache = torch.stack((before, ids), dim=1), self._view(rows, positions)
        logits = self.forward(self.model, self.masks, tokens, at[:, None], positions, cache)
        drawn = self.uniforms[:rows].gather(1, count.clamp(max=self.length - 1)[:, None])[:, 0]
        if len(groups) == 1:
            chosen, scores = groups[0][0](logits, drawn)
        else:
            chosen, scores = torch.empty_like(ids), torch.empty_like(drawn)
            for draw, members in groups:
                chosen[members], scores[members] = draw(logits[members], drawn[members])
        given = forced.index_select(1, self.column)[:, 0]
        live = stalled == 0
        token = torch.where(given >= 0, given, chosen)
        self.out[:rows].index_copy_(1, self.column, token.masked_fill(~live, -1)[:, None])
        self.scores[:rows].index_copy_(1, self.column, scores[:, None])
        over = (token[:, None] == self.ends).any(1) | (count + 1 >= limit)
        if self.call_end is not None:
            over |= token == self.call_end
        before.copy_(torch.where(live, ids, before))
        ids.copy_(torch.where(live, token, ids))
        at.add_(live)
        count.add_(live)
        stalled.copy_(~live | over)
        self.column.add_(1)
        self.logits = logits

    def _view(self, rows: int, positions: int) -> Cache:
        # the same objects as long as the shape is the same: they cost more than they hold
        assert self.cache is not None
        key = (rows, positions, self.cache.positions)
        if self.viewed is None or self.viewed[0] != key:
            self.viewed = key, self.cache.view(rows, positions, self.state[:rows, 1])
        return self.viewed[1]

    def _record(self, rows: int, draw: Draw) -> torch.cuda.CUDAGraph:
        """A CUDA graph of one step of so many rows.

        The step first runs on a stream of its own, as capturing demands; then the state is put back. What it wrote
        into the cache will be written again.
        """
        changed = (self.state, self.out, self.scores, self.column)
        before = [t.clone() for t in changed]
        groups: Groups = [(draw, None)]

        def put_back() -> None:
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # the first compiles
                self._step(rows, self.length, groups)
                put_back()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step(rows, self.length, groups)
        put_back()
        if len(self.graphs) == GRAPHS:
            del self.graphs[next(iter(self.graphs))]  # the oldest
        self.graphs[rows, draw] = graph
        return graph
