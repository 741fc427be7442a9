"""Hidden states and logits of any causal language model, computed once and only where an evaluation reads them.

Letters: B rows, T positions, C width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

OWN_ATTENTION = {"sdpa", "eager"}  # attention implementations that take a ready-made mask (B, 1, T, T)


class Scorer:
    """Splits a model into `states` (its body) and `logits` (its head), and shares the beginnings of texts if it can.

    A model's class does not say what follows its head (soft-caps, scales). So the split is used only if it gives the
    model's own logits on three tokens; otherwise `states` already are the logits. With weights that FSDP2 has split
    there is no split either, because only a call of the whole model gathers them.
    """

    def __init__(self, model: PreTrainedModel):
        self.model: Any = model
        self.config: Any = model.config.get_text_config()
        self.sharded = any(hasattr(p, "full_tensor") for p in model.parameters())
        self.head = None if self.sharded else self._find_head()

    @torch.no_grad()  # not inference_mode, which XLA tensors refuse
    def _find_head(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        model = self.model
        if self.config.model_type == "nanochat_hf":
            return model.logits
        embeddings, body = model.get_output_embeddings(), model.base_model
        if embeddings is None or body is model:
            return None
        ids = torch.arange(3, device=model.device)[None] % self.config.vocab_size
        expected, cap = model(ids, use_cache=False).logits, getattr(self.config, "final_logit_softcapping", None)
        heads = [embeddings, *([lambda x: cap * torch.tanh(embeddings(x) / cap)] if cap else [])]
        hidden = body(ids, use_cache=False)[0]
        return next((head for head in heads if _agree(head(hidden), expected)), None)

    def states(self, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Token ids (B, T) → hidden states (B, T, C) for `logits`; further arguments go to the model."""
        if self.head is None:
            return self.model(ids, use_cache=False, **kwargs).logits
        return self.model.base_model(ids, use_cache=False, **kwargs)[0]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """States (…, C) → float32 logits (…, V)."""
        return (states if self.head is None else self.head(states)).float()

    @torch.no_grad()
    def can_share(self) -> bool:
        """Whether `tree_states` is right for this model: tried on two branches, neither of which may see the other."""
        config, unknown = self.config, ("window_size", "attention_chunk_size", "attention_types")
        kinds = set(getattr(config, "layer_types", None) or ())
        plain = kinds <= {"full_attention", "sliding_attention"} and all(
            getattr(config, name, None) is None for name in unknown
        )
        if self.sharded or not plain or config._attn_implementation not in OWN_ATTENTION:
            return False
        ids = torch.arange(1, 10, device=self.model.device)[None] % config.vocab_size
        branch, positions = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2]]), torch.tensor([[0, 1, 2, 3, 4, 5, 3, 4, 5]])
        try:
            shared = self.tree_states(ids, positions.to(ids.device), branch.to(ids.device))
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return False  # the model takes no position_ids, or no ready-made masks
        alone = [self.states(ids[:, index]) for index in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 6, 7, 8])]
        return _agree(shared[:, :6], alone[0]) and _agree(shared[:, 6:], alone[1][:, 3:])

    def tree_states(self, ids: torch.Tensor, positions: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        """Compute `states` of rows that hold a common beginning and several continuations of it.

        `positions` (B, T) are each token's position in its own text. `branch` (B, T) is 0 in the beginning, else the
        continuation's number. A token sees the beginning and its own continuation, as if each text stood alone.
        """
        T = ids.shape[1]
        order = torch.arange(T, device=ids.device)
        seen = (order[:, None] >= order) & (
            (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
        )  # (B, T, T)
        window, kinds = getattr(self.config, "sliding_window", None), getattr(self.config, "layer_types", None)
        near = seen if window is None else seen & (positions[:, :, None] - positions[:, None, :] < window)
        if kinds is not None and "sliding_attention" in kinds:
            mask = {"full_attention": self._mask(seen), "sliding_attention": self._mask(near)}
        else:
            mask = self._mask(near if kinds is None else seen)
        return self.states(ids, attention_mask=mask, position_ids=positions)

    def _mask(self, seen: torch.Tensor) -> torch.Tensor:
        seen = seen[:, None]  # (B, 1, T, T)
        if self.config._attn_implementation == "sdpa":
            return seen
        return torch.zeros(seen.shape, dtype=self.model.dtype, device=seen.device).masked_fill_(
            ~seen, torch.finfo(self.model.dtype).min
        )


def _agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    # Whether two results are equal up to rounding. Under autocast a float32 result may come from a bfloat16 body: 2 %.
    tolerance = 1e-4 if a.dtype == b.dtype == torch.float32 and not torch.is_autocast_enabled(a.device.type) else 2e-2
    a, b = a.float(), b.float()
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * b.norm())
