"""A cache in which each row has its own length, and the masks that go with it.

Letters: N rows in use, R rows there are, T positions of a prompt, S positions of a row, K key/value heads, D head
width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from .decoding import Buffer, held

Prefix = list[tuple[torch.Tensor, torch.Tensor]]  # each layer's keys and values (K, T, D) of one prompt
KINDS = {"full_attention", "sliding_attention"}


class RowLayer(DynamicLayer):
    """Keys and values (N, K, S, D) in place: row i writes at its own position at[i]."""

    # transformers allows None, which never stands here
    keys: torch.Tensor  # ty: ignore[incompatible-mutable-override]
    values: torch.Tensor  # ty: ignore[incompatible-mutable-override]

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor, order: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.at, self.order = keys, values, at, order
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (N, K, 1, D) at the rows' positions; returns all positions, of which the mask tells which count."""
        self.keys[self.order, :, self.at] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[self.order, :, self.at] = value_states[:, :, 0].to(self.values.dtype)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Positions there are."""
        return self.keys.shape[2]


class RowCache:
    """The keys and values of R rows with S positions each."""

    def __init__(self, like: Prefix, rows: int, positions: int) -> None:
        def room(t: torch.Tensor) -> torch.Tensor:  # zeros: what no query sees must still be a number
            return t.new_zeros(rows, t.shape[0], positions, t.shape[2])

        self.layers = [(room(keys), room(values)) for keys, values in like]
        self.order = torch.arange(rows, device=like[0][0].device)

    @property
    def positions(self) -> int:
        """S."""
        return self.layers[0][0].shape[2]

    def grow(self, positions: int) -> None:
        """Give every row so many positions; what is there stays."""

        def grown(old: torch.Tensor) -> torch.Tensor:
            new = old.new_zeros(*old.shape[:2], positions, old.shape[3])
            new[:, :, : old.shape[2]] = old
            return new

        self.layers = [(grown(keys), grown(values)) for keys, values in self.layers]

    def put(self, row: int, prefix: Prefix) -> None:
        """Copy a prompt into a row, from position 0."""
        for own, given in zip(self.layers, prefix, strict=True):
            for target, source in zip(own, given, strict=True):
                target[row, :, : source.shape[1]] = source

    def move(self, source: int, target: int, filled: int) -> None:
        """Copy the first `filled` positions of a row into another row."""
        for layer in self.layers:
            for tensor in layer:
                tensor[target, :, :filled] = tensor[source, :, :filled]

    def view(self, rows: int, positions: int, at: torch.Tensor) -> Cache:
        """transformers' cache of the first `rows` and `positions`, whose row i writes at at[i]; nothing is copied."""
        order = self.order[:rows]
        return Cache(
            layers=[RowLayer(k[:rows, :, :positions], v[:rows, :, :positions], at, order) for k, v in self.layers]
        )


class Masks:
    """Which positions of its row a query sees: those up to its own, in a layer with a window the last W of them.

    Raises ValueError for a model whose layers know other ways to look back.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config, kind = model.config, model.config._attn_implementation
        kinds = set(getattr(config, "layer_types", None) or ())
        if kind not in ("sdpa", "eager"):
            raise ValueError(f"rows with lengths of their own need attention sdpa or eager, the model has {kind}")
        # models without transformers' attention interface take masks in forms of their own
        if kinds - KINDS or config.is_encoder_decoder or not model._supports_attention_backend:
            raise ValueError(
                f"{config.model_type} cannot be decoded in rows with lengths of their own: its layers "
                f"({', '.join(sorted(kinds)) or 'of one kind'}) need more than keys, values and a mask; use Engine"
            )
        # our model takes finished masks by kind of layer, and so do transformers' models that mix kinds
        self.by_kind = config.model_type == "nanochat_hf" or "sliding_attention" in kinds
        windowed = "sliding_attention" in kinds or not kinds
        self.window: int | None = getattr(config, "sliding_window", None) if windowed else None
        self.additive = model.dtype if kind == "eager" else None

    def __call__(self, at: torch.Tensor, positions: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Positions of the queries (N, 1) → masks (N, 1, 1, S), in the form that the model takes."""
        order = torch.arange(positions, device=at.device)
        full = order <= at  # (N, S)
        near = full & (order > at - self.window) if self.window else full
        full, near = self._shaped(full), self._shaped(near)
        return {"full_attention": full, "sliding_attention": near} if self.by_kind else near

    def _shaped(self, seen: torch.Tensor) -> torch.Tensor:
        seen = seen[:, None, None]
        if self.additive is None:
            return seen
        hidden = torch.finfo(self.additive).min
        return torch.zeros_like(seen, dtype=self.additive).masked_fill(~seen, hidden)


@torch.no_grad()
def read(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[Prefix]:
    """Read prompts in one forward pass → the keys and values of each.

    They are padded on the right, where no token of theirs looks, so they need no mask.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=model.device)
    cache = Cache(layers=[Buffer(growth=0) for _ in range(model.config.num_hidden_layers)])
    order = torch.arange(longest, device=model.device)[None].expand(len(prompts), -1)
    model(input_ids=ids, position_ids=order, past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers = [held(layer) for layer in cache.layers[: model.config.num_hidden_layers]]  # smear adds one of its own
    return [[(k[i, :, : len(p)], v[i, :, : len(p)]) for k, v in layers] for i, p in enumerate(prompts)]
