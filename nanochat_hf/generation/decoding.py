"""The model side of generation: one prefill, then steps of one token a row. static.py has the compiled steps.

Letters: N rows (prompts × samples), T prompt positions, S cached positions, K key/value heads, D head width,
V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from .sampling import Sampler
from .tools import Row

GROWTH = 256  # positions by which a cache grows at once, so that it is copied once in so many steps


def held(layer: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a cache layer that was written to."""
    assert isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None
    return layer.keys, layer.values


class Batch(Protocol):
    """Rows that are decoded together."""

    def keep(self, rows: list[int]) -> bool:
        """Drop all rows but those with these numbers; False where rows cannot be dropped."""
        ...

    def advance(self, rows: Sequence[Row], steps: int, sampler: Sampler) -> list[list[int]]:
        """Decode up to `steps` tokens for all rows; returns the tokens of each row."""
        ...


class Buffer(DynamicLayer):
    """A cache layer in a buffer that grows by blocks; transformers' own copies the whole cache at every step.

    A single query of a layer with a `window` gets only the keys in its window. All layers hold all positions, because
    the prefill uses transformers' masks, which cover all of them.
    """

    # transformers allows None, which stands here only before the first update
    keys: torch.Tensor  # ty: ignore[incompatible-mutable-override]
    values: torch.Tensor  # ty: ignore[incompatible-mutable-override]

    def __init__(self, window: int | None = None, growth: int = GROWTH) -> None:
        super().__init__()
        self.window, self.growth, self.filled = window, growth, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (N, K, T, D); returns the keys and values that the queries may see, as views."""
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

    def _grown(self, old: torch.Tensor, states: torch.Tensor, start: int) -> torch.Tensor:
        new = states.new_empty(*states.shape[:2], self.filled + self.growth, states.shape[3])
        if start:
            new[:, :, :start] = old[:, :, :start]
        return new

    def get_seq_length(self) -> int:
        """Positions held."""
        return self.filled


class Eager:
    """Prompts after one prefill: `logits` (N, V) of the next token, a step for all rows, and the removal of rows.

    `reserve` is how many tokens will come, so that a short answer does not take the memory of a long one.
    """

    @torch.no_grad()  # not inference_mode, which XLA tensors refuse
    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        samples: int,
        pad: int,
        reserve: int = GROWTH,
    ) -> None:
        self.model, config, device = model, model.config, model.device
        longest = max(map(len, prompts))
        # (B, T), padded on the left
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
        starts = torch.tensor([longest - len(p) for p in prompts], device=device)
        mask = torch.arange(longest, device=device) >= starts[:, None]
        positions = (torch.arange(longest, device=device) - starts[:, None]).clamp(min=0)
        # Our model takes finished masks, and those of single queries are a slice of `valid`. To let transformers make
        # them at every step costs more than a layer.
        self.own_masks = config.model_type == "nanochat_hf" and config._attn_implementation == "sdpa"
        if self.own_masks:
            windows = [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
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

    def _select(self, index: torch.Tensor) -> None:
        self.cache.batch_select_indices(index)
        self.logits, self.positions, self.starts = self.logits[index], self.positions[index], self.starts[index]
        self.valid = None if self.valid is None else self.valid[index]

    @torch.no_grad()
    def keep(self, rows: list[int]) -> bool:
        """Drop all rows but those with these numbers; True, since they are gone."""
        self._select(torch.tensor(rows, device=self.starts.device))
        return True

    @torch.no_grad()
    def advance(self, rows: Sequence[Row], steps: int, sampler: Sampler) -> list[list[int]]:
        """Feed each row its last token and sample the next → [[token] for each row]; one step, whatever `steps` is."""
        ids = torch.tensor([row.last for row in rows], device=self.starts.device)[:, None]
        self.positions = self.positions + 1
        if self.valid is not None:
            self.valid = torch.cat((self.valid, self.valid.new_ones(len(rows), 1)), dim=1)
        if self.own_masks:
            full = None if self.valid is None else self.valid[:, None, None]  # (N, 1, 1, S)
            window = self.model.config.sliding_window
            mask = {"full_attention": full, "sliding_attention": None if full is None else full[..., -window:]}
        else:
            mask = None if self.valid is None else self.valid.long()
        self.logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=self.positions, past_key_values=self.cache, use_cache=True
        ).logits[:, -1]
        return [[token] for token in sampler(self.logits).tolist()]
