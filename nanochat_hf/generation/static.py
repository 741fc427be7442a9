"""Compiled decoding on a cache of fixed size; on CUDA one graph holds a whole step, and several steps run before the host looks.

Letters: N rows, S slots of the cache (one for each step, whatever the rows' own positions), V vocabulary.
A row that waits for the host (its tool was called, or it is done) keeps its place: it leaves holes, slots that no query sees.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer

HOLE = 2**30  # the position of a slot that holds nothing: beyond every query
STEPS = 8  # tokens between two looks of the host on CUDA; a tool call costs up to so many holes
BLOCK = 128  # slots are a multiple of this, rows a power of two: few shapes, few compilations
KEPT = 4  # shapes whose caches and graphs are kept


class Slots(DynamicLayer):
    """Keys and values (N, K, S, D) in place; a step writes into the slot that the shared tensor `slot` (1,) names."""

    def __init__(self, like, rows, slots, slot):
        super().__init__()
        make = lambda t: t.new_zeros(rows, t.shape[1], slots, t.shape[3])  # noqa: E731
        self.keys, self.values, self.slot = make(like.keys), make(like.values), slot
        self.dtype, self.device, self.is_initialized = like.keys.dtype, like.keys.device, True

    def update(self, key_states, value_states, *args, **kwargs):
        """Write (N, K, 1, D) into the slot; all slots come back, the mask tells which of them count."""
        self.keys.index_copy_(2, self.slot, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.slot, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_seq_length(self):
        """Slots there are."""
        return self.keys.shape[2]


def _forward(model, ids, positions, slot_positions, cache, window):
    """Logits (N, V) after one token a row; a query sees the slots whose position is at most its own, and within the window."""
    seen = slot_positions <= positions  # (N, S)
    mask = seen[:, None, None]
    if window:
        mask = {
            "full_attention": mask,
            "sliding_attention": (seen & (slot_positions > positions - window))[:, None, None],
        }
    return model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).logits[:, -1]


class Slate:
    """The tensors of one shape, at fixed addresses, and the step that works on them."""

    def __init__(self, static, like, rows, slots):
        device = static.model.device
        self.static, self.slots, self.graph, self.captured = static, slots, None, None
        full = lambda shape, value=0, **k: torch.full(shape, value, device=device, **({"dtype": torch.long} | k))  # noqa: E731
        self.slot, self.column = full((1,)), full((1,))
        self.ids, self.positions, self.count = full((rows, 1)), full((rows, 1)), full((rows, 1))
        self.slot_positions = full((rows, slots), HOLE)
        self.stalled = full((rows,), True, dtype=torch.bool)
        self.forced, self.out = full((rows, STEPS), -1), full((rows, STEPS), -1)
        self.uniforms = full((rows, slots), 0.0, dtype=torch.float32)
        self.cache = Cache(layers=[Slots(layer, rows, slots, self.slot) for layer in like])

    def fill(self, eager, uniforms):
        """Take over the rows of `eager`, which were read once and have one cache."""
        filled, rows = eager.cache.get_seq_length(), len(eager.logits)
        for own, given in zip(self.cache.layers, eager.cache.layers, strict=True):
            own.keys[:rows, :, :filled], own.values[:rows, :, :filled] = (
                given.keys[:, :, :filled],
                given.values[:, :, :filled],
            )
            # what rows without a prompt read must be numbers; what their own steps write is
            own.keys[rows:, :, :filled], own.values[rows:, :, :filled] = (
                given.keys[:1, :, :filled],
                given.values[:1, :, :filled],
            )
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

    def step(self, sample, call_end):
        """Feed `ids`, sample the next. Nothing here asks the host, so CUDA can record it."""
        live = (~self.stalled)[:, None]  # (N, 1)
        self.slot.add_(1)
        self.positions.add_(live)
        # masked_fill takes its number as an argument of the kernel; torch.where would copy it from the host, which no recording allows
        self.slot_positions.index_copy_(1, self.slot, self.positions.masked_fill(~live, HOLE))
        logits = self.static.compiled(
            self.static.model, self.ids, self.positions, self.slot_positions, self.cache, self.static.window
        )
        drawn = self.uniforms.gather(1, self.count.clamp(max=self.slots - 1))[:, 0]
        given = self.forced.index_select(1, self.column)  # (N, 1)
        token = torch.where(given >= 0, given, sample(logits, drawn)[:, None])
        self.out.index_copy_(1, self.column, token.masked_fill(~live, -1))
        self.ids.copy_(torch.where(live, token, self.ids))
        self.count.add_(live)
        self.column.add_(1)
        if call_end is not None:
            self.stalled.logical_or_((self.ids == call_end)[:, 0])

    def state(self):
        """What a step changes, except for slots and columns beyond the present ones."""
        return [
            self.slot,
            self.column,
            self.ids,
            self.positions,
            self.count,
            self.stalled,
            self.slot_positions,
            self.out,
        ]

    def record(self, sample, call_end):
        """A CUDA graph of one step. It is warmed up on a stream of its own, as capturing demands, and the state put back."""
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

    def put_back(self, before):
        """Undo a step: the slot it wrote will be written again."""
        for tensor, value in zip(self.state(), before, strict=True):
            tensor.copy_(value)


class Static:
    """Decoding compiled for fixed shapes. Finished rows stay, idle, for leaving would make a new shape and so a new compilation.

    On CUDA a step is replayed as a graph, STEPS of them between two looks of the host: neither Python nor the kernels' launches cost time.
    """

    def __init__(self, model, call_end=None):
        """`call_end`: the token after which a row waits for its tool."""
        if model.config._attn_implementation != "sdpa":
            raise ValueError(
                f"compile=True needs attention sdpa, the model has {model.config._attn_implementation}; load it with sdpa"
            )
        window = getattr(model.config, "sliding_window", None)
        if window and model.config.model_type != "nanochat_hf":
            raise ValueError(
                f"compile=True cannot decode {model.config.model_type} with its sliding_window={window}: after a prompt its "
                "cache holds the window alone; leave compile out"
            )
        # each shape is one more compilation of the same code, which dynamo stops at 8 unless told
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self.model, self.call_end, self.slates = model, call_end, {}
        self.compiled = torch.compile(_forward, fullgraph=True, dynamic=False)
        kinds = getattr(model.config, "layer_types", None) or ()
        self.window = model.config.sliding_window if "sliding_attention" in kinds else None

    @torch.no_grad()
    def begin(self, eager, uniforms, reserve):
        """Take over the rows of `eager`, with room for `reserve` more tokens; returns itself. `uniforms` (N, reserve) or None."""
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

    def keep(self, rows):
        """False: rows cannot leave a fixed shape."""
        return False

    @torch.no_grad()
    def advance(self, rows, steps, sampler):
        """Up to `steps` steps for all rows → the tokens that each took. A done row takes none."""
        slate, on_cuda = self.slate, self.model.device.type == "cuda"
        alive = [row for row in rows if not row.done]
        wanted = max(row.left for row in alive)
        steps = min(steps, STEPS, wanted) if slate.left >= wanted + STEPS else 1
        idle = len(slate.ids) - len(rows)
        pending = [[*list(row.pending)[:steps], *[-1] * (STEPS - min(steps, len(row.pending)))] for row in rows]
        slate.forced.copy_(torch.tensor(pending + [[-1] * STEPS] * idle))
        slate.stalled.copy_(torch.tensor([row.done for row in rows] + [True] * idle))
        slate.ids.copy_(torch.tensor([[row.last] for row in rows] + [[0]] * idle))
        slate.column.zero_()
        if on_cuda and slate.captured != sampler.settings:
            slate.record(sampler.sample, self.call_end)
            slate.captured = sampler.settings
        for _ in range(steps):
            slate.graph.replay() if on_cuda else slate.step(sampler.sample, self.call_end)
        slate.left -= steps
        return [[token for token in tokens if token >= 0] for tokens in slate.out[: len(rows), :steps].tolist()]


def pad_rows(tensor, rows):
    """Repeat the first row of `tensor` (N, …) until there are `rows`."""
    return (
        torch.cat((tensor, tensor[:1].expand(rows - len(tensor), *tensor.shape[1:]))) if len(tensor) < rows else tensor
    )
