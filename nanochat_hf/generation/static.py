"""Compiled decoding on a cache of fixed size.

On CUDA one graph holds a whole step, and several steps run before the host looks at the tokens.

Letters: N rows, S slots of the cache (one for each step, whatever the rows' own positions), V vocabulary. A row that
waits for the host, because its tool was called or it is done, still passes a slot at every step. Such slots are holes:
they hold nothing, and no query sees them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from nanochat_hf.model.smear_nanochat_hf import TokenHistory, history_of

from .decoding import Eager, held
from .sampling import Sampler
from .tools import Row

HOLE = 2**30  # the position of a slot that holds nothing: beyond every query
STEPS = 8  # tokens between two looks of the host on CUDA; a tool call costs up to so many holes
BLOCK = 128  # slots are a multiple of this, rows a power of two: few shapes, few compilations
KEPT = 4  # shapes whose caches and graphs are kept

Sample = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # as Sampler.sample


class Slots(DynamicLayer):
    """Keys and values (N, K, S, D) in place; a step writes into the slot that the shared tensor `slot` (1,) names."""

    # transformers allows None, which never stands here
    keys: torch.Tensor  # ty: ignore[incompatible-mutable-override]
    values: torch.Tensor  # ty: ignore[incompatible-mutable-override]

    def __init__(self, like: object, rows: int, slots: int, slot: torch.Tensor) -> None:
        super().__init__()
        keys, values = held(like)
        self.keys, self.values = (t.new_zeros(rows, t.shape[1], slots, t.shape[3]) for t in (keys, values))
        self.slot, self.dtype, self.device, self.is_initialized = slot, keys.dtype, keys.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (N, K, 1, D) into the slot; returns all slots, of which the mask tells the ones that count."""
        self.keys.index_copy_(2, self.slot, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.slot, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Slots there are."""
        return self.keys.shape[2]


class Feed(NamedTuple):
    """What a step gives to the model: a token a row, its position, and the positions of all slots.

    ids, previous and positions (N, 1), slot_positions (N, S). `previous`: the tokens before, for models with smear.
    """

    ids: torch.Tensor
    previous: torch.Tensor | None
    positions: torch.Tensor
    slot_positions: torch.Tensor


def _forward(model: PreTrainedModel, feed: Feed, cache: Cache, window: int | None) -> torch.Tensor:
    """Logits (N, V) after one token a row.

    A query sees the slots whose position is at most its own, and in a layer with a window within that.
    """
    ids, previous, positions, slot_positions = feed
    seen = slot_positions <= positions  # (N, S)
    mask = seen[:, None, None]
    if window:
        mask = {
            "full_attention": mask,
            "sliding_attention": (seen & (slot_positions > positions - window))[:, None, None],
        }
    before = {} if previous is None else {"previous_ids": previous}
    return model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **before
    ).logits[:, -1]


class Slate:
    """The tensors of one shape, at fixed addresses, and the step that works on them."""

    def __init__(self, static: "Static", like: Sequence[object], rows: int, slots: int) -> None:
        device = static.model.device

        def full(*shape: int, value: float = 0, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.full(shape, value, device=device, dtype=dtype)

        self.static, self.slots, self.left = static, slots, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captured: tuple[float, int | None, float | None] | None = None  # the settings in the graph
        self.slot, self.column = full(1), full(1)
        self.ids, self.positions, self.count = full(rows, 1), full(rows, 1), full(rows, 1)
        self.slot_positions = full(rows, slots, value=HOLE)
        self.stalled = full(rows, value=True, dtype=torch.bool)
        self.forced, self.out = full(rows, STEPS, value=-1), full(rows, STEPS, value=-1)
        self.uniforms = full(rows, slots, value=0.0, dtype=torch.float32)
        self.previous = full(rows, 1) if static.smears else None
        self.layers = [Slots(layer, rows, slots, self.slot) for layer in like if not isinstance(layer, TokenHistory)]
        self.cache = Cache(layers=[*self.layers])

    def fill(self, eager: Eager, uniforms: torch.Tensor | None) -> None:
        """Take over the rows of `eager`, whose prompts are in its cache."""
        filled, rows = eager.cache.get_seq_length(), len(eager.logits)
        history = history_of(eager.cache)
        if self.previous is not None and history is not None:
            self.previous.copy_(pad_rows(history.last(), len(self.ids)))
        filling = [layer for layer in eager.cache.layers if layer is not history]
        for own, given in zip(self.layers, filling, strict=True):
            for target, source in zip((own.keys, own.values), held(given), strict=True):
                target[:rows, :, :filled] = source[:, :, :filled]
                # Rows without a prompt must read numbers, not NaN. Their own steps write numbers.
                target[rows:, :, :filled] = source[:1, :, :filled]
        self.slot.fill_(filled - 1)
        self.slot_positions.fill_(HOLE)
        order = torch.arange(filled, device=self.slot.device)
        starts = pad_rows(eager.starts, len(self.ids))[:, None]
        self.slot_positions[:, :filled] = torch.where(order >= starts, order - starts, HOLE)
        self.positions.copy_(pad_rows(eager.positions, len(self.ids)))
        self.count.fill_(1)
        self.stalled.fill_(True)
        if uniforms is not None:
            self.uniforms[:rows, : uniforms.shape[1]] = uniforms
        self.left = self.slots - filled

    def step(self, sample: Sample, call_end: int | None) -> None:
        """Feed `ids`, sample the next. Nothing here asks the host, so CUDA can record it."""
        live = (~self.stalled)[:, None]  # (N, 1)
        self.slot.add_(1)
        self.positions.add_(live)
        # masked_fill passes its number to the kernel as an argument. torch.where would copy it from the host, which
        # cannot be recorded.
        self.slot_positions.index_copy_(1, self.slot, self.positions.masked_fill(~live, HOLE))
        feed = Feed(self.ids, self.previous, self.positions, self.slot_positions)
        logits = self.static.compiled(self.static.model, feed, self.cache, self.static.window)
        if self.previous is not None:  # a row that waits feeds a token that its next step will feed again
            self.previous.copy_(torch.where(live, self.ids, self.previous))
        drawn = self.uniforms.gather(1, self.count.clamp(max=self.slots - 1))[:, 0]
        given = self.forced.index_select(1, self.column)  # (N, 1)
        token = torch.where(given >= 0, given, sample(logits, drawn)[:, None])
        self.out.index_copy_(1, self.column, token.masked_fill(~live, -1))
        self.ids.copy_(torch.where(live, token, self.ids))
        self.count.add_(live)
        self.column.add_(1)
        if call_end is not None:
            self.stalled.logical_or_((self.ids == call_end)[:, 0])

    def state(self) -> list[torch.Tensor]:
        """What a step changes, except for slots and columns that come later."""
        before = [] if self.previous is None else [self.previous]
        return [
            *before,
            self.slot,
            self.column,
            self.ids,
            self.positions,
            self.count,
            self.stalled,
            self.slot_positions,
            self.out,
        ]

    def record(self, sample: Sample, call_end: int | None) -> None:
        """Record a CUDA graph of one step.

        The step first runs on a stream of its own, as capturing demands; then the state is put back.
        """
        before = [t.clone() for t in self.state()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # the first compiles
                self.step(sample, call_end)
                self.put_back(before)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.step(sample, call_end)
        self.put_back(before)

    def put_back(self, before: Sequence[torch.Tensor]) -> None:
        """Undo a step: the slot it wrote will be written again."""
        for tensor, value in zip(self.state(), before, strict=True):
            tensor.copy_(value)


class Static:
    """Decoding compiled for fixed shapes.

    Finished rows stay, idle, because dropping them would make a new shape and so a new compilation. On CUDA a step is
    replayed as a graph, STEPS of them between two looks of the host, so neither Python nor kernel launches cost time.

    `call_end` is the token after which a row waits for its tool. Raises ValueError for a model that cannot be decoded
    this way.
    """

    def __init__(self, model: PreTrainedModel, call_end: int | None = None) -> None:
        if model.config._attn_implementation != "sdpa":
            raise ValueError(
                f"compile=True needs attention sdpa, the model has {model.config._attn_implementation}; "
                "load it with sdpa"
            )
        window = getattr(model.config, "sliding_window", None)
        if window and model.config.model_type != "nanochat_hf":
            raise ValueError(
                f"compile=True cannot decode {model.config.model_type} with its sliding_window={window}: "
                "after a prompt its cache holds the window alone; leave compile out"
            )
        allow_shapes()
        self.model, self.call_end = model, call_end
        self.slates: dict[tuple[int, int], Slate] = {}  # by rows and slots
        self.compiled = torch.compile(_forward, fullgraph=True, dynamic=False)
        kinds = getattr(model.config, "layer_types", None) or ()
        self.window = model.config.sliding_window if "sliding_attention" in kinds else None
        self.smears = bool(getattr(model.config, "smear", False))

    @torch.no_grad()
    def begin(self, eager: Eager, uniforms: torch.Tensor | None, reserve: int) -> "Static":
        """Take over the rows of `eager`, with room for `reserve` more tokens; returns itself.

        `uniforms` is (N, reserve), or None when greedy.
        """
        filled, rows = eager.cache.get_seq_length(), len(eager.logits)
        # some room for holes; when it is used up, the host looks after each token and no more arise
        shape = (1 << (rows - 1).bit_length(), -(-(filled + reserve + 4 * STEPS) // BLOCK) * BLOCK)
        if shape not in self.slates:
            if len(self.slates) == KEPT:
                del self.slates[next(iter(self.slates))]  # the oldest
            self.slates[shape] = Slate(self, eager.cache.layers, *shape)
        self.slate = self.slates[shape]
        self.slate.fill(eager, uniforms)
        return self

    def keep(self, rows: list[int]) -> bool:
        """False: rows cannot leave a fixed shape."""
        return False

    @torch.no_grad()
    def advance(self, rows: Sequence[Row], steps: int, sampler: Sampler) -> list[list[int]]:
        """Up to `steps` steps for all rows → the tokens that each took. A done row takes none."""
        slate = self.slate
        alive = [row for row in rows if not row.done]
        wanted = max(row.left for row in alive)
        steps = min(steps, STEPS, wanted) if slate.left >= wanted + STEPS else 1
        idle = len(slate.ids) - len(rows)
        pending = [[*list(row.pending)[:steps], *[-1] * (STEPS - min(steps, len(row.pending)))] for row in rows]
        slate.forced.copy_(torch.tensor(pending + [[-1] * STEPS] * idle))
        slate.stalled.copy_(torch.tensor([row.done for row in rows] + [True] * idle))
        slate.ids.copy_(torch.tensor([[row.last] for row in rows] + [[0]] * idle))
        slate.column.zero_()
        if self.model.device.type == "cuda" and slate.captured != sampler.settings:
            slate.record(sampler.sample, self.call_end)
            slate.captured = sampler.settings
        for _ in range(steps):
            if slate.graph is not None:
                slate.graph.replay()
            else:
                slate.step(sampler.sample, self.call_end)
        slate.left -= steps
        return [[token for token in tokens if token >= 0] for tokens in slate.out[: len(rows), :steps].tolist()]


def allow_shapes() -> None:
    """Let dynamo compile the same code for many shapes; unless told it stops at 8."""
    limit = max(torch._dynamo.config.recompile_limit, 64)
    torch._dynamo.config.recompile_limit = limit  # ty: ignore[invalid-assignment]  # it is declared as literally 8


def pad_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Repeat the first row of `tensor` (N, …) until there are `rows`."""
    if len(tensor) >= rows:
        return tensor
    return torch.cat((tensor, tensor[:1].expand(rows - len(tensor), *tensor.shape[1:])))
