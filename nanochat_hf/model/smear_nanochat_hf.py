"""Smear: each token's embedding takes a gated share of the embedding of the token before, which caches remember.

Letters: B rows, T positions, C hidden_size, S cached positions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from .configuration_nanochat_hf import SMEAR_CHANNELS, NanochatConfig
from .layers_nanochat_hf import linear


class TokenHistory(DynamicLayer):
    """The ids (B, 1, S, 1) of all positions of a cache.

    It stands behind the cache's other layers, so that reordering for beams, cropping, selecting and repeating rows
    reach it as they reach keys and values.
    """

    # transformers allows None, which stands here only before the first call
    keys: torch.Tensor  # ty: ignore[incompatible-mutable-override]

    def add(self, ids: Tensor) -> None:
        """Append ids (B, T)."""
        self.update(ids[:, None, :, None], ids[:, None, :, None])

    def last(self) -> Tensor:
        """The newest id of each row, (B, 1)."""
        return self.keys[:, 0, -1:, 0]


class LastToken(StaticLayer):
    """The id (B, 1, 1, 1) of the newest position of a cache of fixed size, at a fixed address."""

    # transformers allows None, which stands here only before the first call
    keys: torch.Tensor  # ty: ignore[incompatible-mutable-override]

    def __init__(self) -> None:
        super().__init__(max_cache_len=1)

    def add(self, ids: Tensor) -> None:
        """Remember the last of ids (B, T)."""
        newest = ids[:, None, -1:, None]
        if not self.is_initialized:
            self.lazy_initialization(newest, newest)
        self.keys.copy_(newest)

    def last(self) -> Tensor:
        """The newest id of each row, (B, 1)."""
        return self.keys[:, 0, :, 0].clone()  # `add` will write in its place


def history_of(cache: Cache | None) -> TokenHistory | LastToken | None:
    """What a cache remembers of the tokens; None before the first call with it."""
    layers: list[Any] = [] if cache is None else cache.layers
    return next((layer for layer in layers if isinstance(layer, TokenHistory | LastToken)), None)


def token_before(config: NanochatConfig, cache: Cache | None, paged: bool) -> Tensor | None:
    """The id (B, 1) of the token before those that a call with this cache brings; None where there is none.

    Raises ValueError for a cache that was filled without its tokens being remembered, and for continuous batching over
    pages of many requests, of which the caller says that it is `paged`.
    """
    if paged or config._attn_implementation.startswith(("paged", "vllm")):
        raise ValueError(
            "continuous batching over pages does not give the token before each, which smear needs; "
            "generate with a cache of transformers, or by nanochat_hf.generation.Continuous"
        )
    history = history_of(cache)
    if history is not None:
        return history.last() if history.is_initialized else None
    filled = cache.get_seq_length() if cache is not None else 0
    if isinstance(filled, int) and filled > 0:
        raise ValueError(
            f"the cache holds {filled} positions but not their tokens, which smear needs; "
            "fill it by this model, or give previous_ids (B, 1)"
        )
    return None


def remember(cache: Cache, ids: Tensor) -> None:
    """Note ids (B, T) in the cache, after the layers have written to it (some caches make their layers only then)."""
    history = history_of(cache)
    if history is None:
        history = LastToken() if cache.is_compileable else TokenHistory()
        cache.layers.append(history)
    history.add(ids)


def follows(position_ids: Tensor, attention_mask: Any, rows: int, borders: Tensor | None = None) -> Tensor:
    """Whether each position goes on from the one before, (B or 1, T) bool, in `rows` rows of positions (B or 1, T).

    A document begins where a position is 0 or not the one before plus 1, and at `borders`, int32 offsets among all B·T
    positions. Positions that a mask (B, S ≥ T) hides have no followers.

    >>> follows(torch.tensor([[0, 1, 2, 0, 1]]), None, 1).tolist()
    [[False, True, True, False, True]]
    """
    positions = position_ids.shape[1]
    goes_on = torch.diff(position_ids, prepend=position_ids[:, :1] - 1) == 1
    goes_on = goes_on & (position_ids > 0)
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        seen = attention_mask[:, -positions - 1 :].bool()
        goes_on = goes_on & F.pad(seen, (positions + 1 - seen.shape[1], 0), value=False)[:, :-1]
    if borders is not None:
        flat = goes_on.expand(rows, -1).flatten()
        goes_on = flat.index_fill(0, borders[:-1].long(), False).view(rows, positions)
    return goes_on


class Smear(nn.Module):
    """e_t + strength·sigmoid(gate(e_t))·e_{t−1}, with one gate for all channels; a document's first token stays."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = linear(SMEAR_CHANNELS, 1, "smear gate")
        self.strength = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, before: Tensor | None, goes_on: Tensor) -> Tensor:
        """Normed embeddings (B, T, C), that of the token before the first (B, 1, C), and `follows` → (B, T, C)."""
        before = torch.zeros_like(x[:, :1]) if before is None else before
        neighbour = torch.cat((before, x[:, :-1]), dim=1)
        gate = torch.sigmoid(self.gate(x[..., :SMEAR_CHANNELS])).to(x.dtype) * goes_on.unsqueeze(-1)
        # an element and not the vector: a 0-d tensor leaves half precision as it is
        return x + self.strength[0] * gate * neighbour
