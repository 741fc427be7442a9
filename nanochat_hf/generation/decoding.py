"""The model side of generation: one prefill, then steps of one token a row, eager or compiled.

Letters: N rows (prompts × samples), T prompt positions, S cached positions, K key/value heads, D head width, V vocabulary.
"""

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

GROWTH = 256  # cached positions by which a buffer grows: one copy of the cache in so many steps, not one a step


class Buffer(DynamicLayer):
    """A cache layer in a buffer that grows by blocks; transformers' own copies the whole cache at every step.

    Single queries of a layer with a `window` get the keys of the window only. All layers hold all positions, so that one
    prefill with transformers' masks fits them.
    """

    def __init__(self, window=None):
        super().__init__()
        self.window, self.filled = window, 0

    def update(self, key_states, value_states, *args, **kwargs):
        """Append (N, K, T, D) and return what the queries may see, as views."""
        start, self.filled = self.filled, self.filled + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if start == 0 or self.filled > self.keys.shape[2]:
            self.keys, self.values = (self._grown(o, s, start) for o, s in ((self.keys, key_states), (self.values, value_states)))
        self.keys[:, :, start : self.filled] = key_states
        self.values[:, :, start : self.filled] = value_states
        first = max(0, self.filled - self.window) if self.window and key_states.shape[2] == 1 else 0
        return self.keys[:, :, first : self.filled], self.values[:, :, first : self.filled]

    def _grown(self, old, states, start):
        new = states.new_empty(*states.shape[:2], self.filled + GROWTH, states.shape[3])
        if start:
            new[:, :, :start] = old[:, :, :start]
        return new

    def get_seq_length(self):
        """Positions held."""
        return self.filled


class Eager:
    """Prompts after one prefill: `logits` (N, V) of the next token, a step for all rows, and the removal of rows."""

    @torch.inference_mode()
    def __init__(self, model, prompts, samples, pad):
        self.model, config, device = model, model.config, model.device
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)  # (B, T), padded on the left
        starts = torch.tensor([longest - len(p) for p in prompts], device=device)
        mask = torch.arange(longest, device=device) >= starts[:, None]
        positions = (torch.arange(longest, device=device) - starts[:, None]).clamp(min=0)
        # masks of single queries are one slice of `valid`; making them anew costs transformers more than a layer
        self.own_masks = config.model_type == "nanochat_hf" and config._attn_implementation == "sdpa"
        self.window = getattr(config, "sliding_window", None)
        if self.own_masks:
            windows = [self.window if kind == "sliding_attention" else None for kind in config.layer_types]
            self.cache = Cache(layers=[Buffer(window) for window in windows])
        else:
            self.cache = DynamicCache(config=config)
        padded = bool(starts.any())
        self.logits = model(
            input_ids=ids, attention_mask=mask.long() if padded else None, position_ids=positions, past_key_values=self.cache,
            use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
        self.positions, self.starts, self.valid = positions[:, -1:], starts, mask if padded else None
        if samples > 1:
            self._select(torch.arange(len(prompts), device=device).repeat_interleave(samples))

    def _select(self, index):
        for layer in self.cache.layers:
            layer.batch_select_indices(index)
        self.logits, self.positions, self.starts = self.logits[index], self.positions[index], self.starts[index]
        self.valid = None if self.valid is None else self.valid[index]

    @torch.inference_mode()
    def keep(self, rows):
        """Only the rows with these numbers stay in the batch; True, for they did leave."""
        self._select(torch.tensor(rows, device=self.starts.device))
        return True

    @torch.inference_mode()
    def step(self, tokens):
        """Feed one token a row; then `logits` are those after it."""
        ids = torch.tensor(tokens, device=self.starts.device)[:, None]
        self.positions = self.positions + 1
        if self.valid is not None:
            self.valid = torch.cat((self.valid, self.valid.new_ones(len(tokens), 1)), dim=1)
        if self.own_masks:
            full = None if self.valid is None else self.valid[:, None, None]  # (N, 1, 1, S)
            mask = {"full_attention": full, "sliding_attention": None if full is None else full[..., -self.window :]}
        else:
            mask = None if self.valid is None else self.valid.long()
        self.logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=self.positions, past_key_values=self.cache, use_cache=True
        ).logits[:, -1]


def _static_step(model, ids, positions, starts, length, cache, window):
    """One token a row on a cache of fixed size; `length` positions are filled, those before a row's start are its padding."""
    keys = torch.arange(cache.layers[0].max_cache_len, device=ids.device)
    seen = (keys >= starts[:, None]) & (keys <= length)  # (N, S)
    mask = seen[:, None, None]
    if window:
        mask = {"full_attention": mask, "sliding_attention": (seen & (keys > length - window))[:, None, None]}
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits[:, -1]


class Static:
    """Decoding compiled for fixed shapes. Rows are rounded up to a power of two and positions to a multiple of 256, so that few shapes
    exist; finished rows stay, idle, for leaving would make a new shape and so a new compilation."""

    def __init__(self, model):
        if model.config._attn_implementation != "sdpa":
            raise ValueError(f"compile=True needs attention sdpa, the model has {model.config._attn_implementation}; load it with sdpa")
        # each shape is one more compilation of the same code, which dynamo stops at 8 unless told
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        mode = "reduce-overhead" if model.device.type == "cuda" else "default"
        self.model, self.caches = model, {}
        self.compiled = torch.compile(_static_step, mode=mode, fullgraph=True, dynamic=False)
        kinds = getattr(model.config, "layer_types", None) or ()
        self.window = model.config.sliding_window if "sliding_attention" in kinds else None

    @torch.no_grad()
    def begin(self, eager, reserve):
        """Take over the rows of `eager`, with room for `reserve` more tokens; returns itself."""
        rows, filled = len(eager.logits), eager.cache.get_seq_length()
        shape = (1 << (rows - 1).bit_length(), -(-(filled + reserve) // 256) * 256)
        if shape not in self.caches:
            self.caches[shape] = Cache(layers=[StaticLayer(max_cache_len=shape[1]) for _ in eager.cache.layers])
        self.cache = self.caches[shape]
        self.cache.reset()
        for own, given in zip(self.cache.layers, eager.cache.layers, strict=True):
            keys, values = (pad_rows(t[:, :, :filled], shape[0]) for t in (given.keys, given.values))
            own.update(keys, values)
        self.rows, self.spare, self.logits = rows, [0] * (shape[0] - rows), eager.logits
        self.positions, self.starts = pad_rows(eager.positions, shape[0]).clone(), pad_rows(eager.starts, shape[0]).clone()
        self.length = torch.tensor(filled - 1, device=self.starts.device)
        return self

    def keep(self, rows):
        """False: rows cannot leave a fixed shape."""
        return False

    @torch.no_grad()
    def step(self, tokens):
        """Feed one token a row; then `logits` are those after it."""
        ids = torch.tensor(tokens + self.spare, device=self.starts.device)[:, None]
        self.positions, self.length = self.positions + 1, self.length + 1
        torch.compiler.cudagraph_mark_step_begin()
        logits = self.compiled(self.model, ids, self.positions, self.starts, self.length, self.cache, self.window)
        self.logits = logits[: self.rows]


def pad_rows(tensor, rows):
    """Repeat the first row of `tensor` (N, …) until there are `rows`."""
    return torch.cat((tensor, tensor[:1].expand(rows - len(tensor), *tensor.shape[1:]))) if len(tensor) < rows else tensor
