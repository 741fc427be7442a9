"""The model side of generation: one prefill, then steps of one token a row. static.py has the compiled steps.

Letters: N rows (prompts × samples), T prompt positions, S cached positions, K key/value heads, D head width, V vocabulary.
"""

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

GROWTH = 256  # cached positions by which a buffer grows: one copy of the cache in so many steps, not one a step


class Buffer(DynamicLayer):
    """A cache layer in a buffer that grows by blocks; transformers' own copies the whole cache at every step.

    Single queries of a layer with a `window` get the keys of the window only. All layers hold all positions, so that one
    prefill with transformers' masks fits them.
    """

    def __init__(self, window=None, growth=GROWTH):
        super().__init__()
        self.window, self.growth, self.filled = window, growth, 0

    def update(self, key_states, value_states, *args, **kwargs):
        """Append (N, K, T, D) and return what the queries may see, as views."""
        start, self.filled = self.filled, self.filled + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if start == 0 or self.filled > self.keys.shape[2]:
            self.keys, self.values = (
                self._grown(o, s, start) for o, s in ((self.keys, key_states), (self.values, value_states))
            )
        self.keys[:, :, start : self.filled] = key_states
        self.values[:, :, start : self.filled] = value_states
        first = max(0, self.filled - self.window) if self.window and key_states.shape[2] == 1 else 0
        return self.keys[:, :, first : self.filled], self.values[:, :, first : self.filled]

    def _grown(self, old, states, start):
        new = states.new_empty(*states.shape[:2], self.filled + self.growth, states.shape[3])
        if start:
            new[:, :, :start] = old[:, :, :start]
        return new

    def get_seq_length(self):
        """Positions held."""
        return self.filled


class Eager:
    """Prompts after one prefill: `logits` (N, V) of the next token, a step for all rows, and the removal of rows.

    `reserve`: the tokens that are to come; a short answer should not pay for the memory of a long one.
    """

    @torch.no_grad()  # not inference_mode, which XLA tensors refuse
    def __init__(self, model, prompts, samples, pad, reserve=GROWTH):
        self.model, config, device = model, model.config, model.device
        longest = max(map(len, prompts))
        ids = torch.tensor(
            [[pad] * (longest - len(p)) + list(p) for p in prompts], device=device
        )  # (B, T), padded on the left
        starts = torch.tensor([longest - len(p) for p in prompts], device=device)
        mask = torch.arange(longest, device=device) >= starts[:, None]
        positions = (torch.arange(longest, device=device) - starts[:, None]).clamp(min=0)
        # masks of single queries are one slice of `valid`; making them anew costs transformers more than a layer
        self.own_masks = config.model_type == "nanochat_hf" and config._attn_implementation == "sdpa"
        self.window = getattr(config, "sliding_window", None)
        if self.own_masks:
            windows = [self.window if kind == "sliding_attention" else None for kind in config.layer_types]
            self.cache = Cache(layers=[Buffer(window, min(reserve, GROWTH)) for window in windows])
        else:
            self.cache = DynamicCache(config=config)
        padded = any(len(p) < longest for p in prompts)
        self.logits = model(
            input_ids=ids,
            attention_mask=mask.long() if padded else None,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.positions, self.starts, self.valid = positions[:, -1:], starts, mask if padded else None
        if samples > 1:
            self._select(torch.arange(len(prompts), device=device).repeat_interleave(samples))

    def _select(self, index):
        for layer in self.cache.layers:
            layer.batch_select_indices(index)
        self.logits, self.positions, self.starts = self.logits[index], self.positions[index], self.starts[index]
        self.valid = None if self.valid is None else self.valid[index]

    @torch.no_grad()
    def keep(self, rows):
        """Only the rows with these numbers stay in the batch; True, for they did leave."""
        self._select(torch.tensor(rows, device=self.starts.device))
        return True

    @torch.no_grad()
    def advance(self, rows, steps, sampler):
        """Feed each row's last token and sample the next → [[token] for each row]; one step, whatever `steps` allows."""
        ids = torch.tensor([row.last for row in rows], device=self.starts.device)[:, None]
        self.positions = self.positions + 1
        if self.valid is not None:
            self.valid = torch.cat((self.valid, self.valid.new_ones(len(rows), 1)), dim=1)
        if self.own_masks:
            full = None if self.valid is None else self.valid[:, None, None]  # (N, 1, 1, S)
            mask = {"full_attention": full, "sliding_attention": None if full is None else full[..., -self.window :]}
        else:
            mask = None if self.valid is None else self.valid.long()
        self.logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=self.positions, past_key_values=self.cache, use_cache=True
        ).logits[:, -1]
        return [[token] for token in sampler(self.logits).tolist()]
