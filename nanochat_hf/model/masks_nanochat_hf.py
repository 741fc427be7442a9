"""Keep packed documents apart: by masks, or by the documents' offsets ("borders") where the attention takes those.

Letters: B rows, T positions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_nanochat_hf import NanochatConfig


def takes_borders(implementation: str) -> bool:
    """Whether an attention implementation keeps documents apart by their borders (`cu_seq_lens`), not by a mask."""
    if "flash" in implementation:
        return True
    known = implementation in ALL_ATTENTION_FUNCTIONS
    return known and getattr(ALL_ATTENTION_FUNCTIONS[implementation], "takes_borders", False)


@torch.compiler.disable  # `nonzero` would break the graph anyway; so it breaks here, at a place of our choice
def varlen_arguments(position_ids: Tensor, batch_size: int, device: torch.device | None = None) -> dict:
    """The arguments that keep packed documents apart in attention: cu_seq_lens and max_length of queries and keys.

    A document begins with each row, and wherever a position (B or 1, T) is not the one before plus 1:
    [[0, 1, 2, 0, 1]] → cu_seq_lens [0, 3, 5]. transformers would look only at B = 1, and in each layer.
    """
    begins = torch.diff(position_ids, prepend=position_ids[:, :1], dim=-1) != 1  # a row's first difference is 0
    begins = begins.expand(batch_size, -1).flatten().nonzero().flatten()
    borders = F.pad(begins, (0, 1), value=batch_size * position_ids.shape[1]).int()  # (documents + 1)
    borders = borders.to(device, non_blocking=True)
    # otherwise the layers would be compiled again for each new number of documents, even with dynamic=False
    torch._dynamo.maybe_mark_dynamic(borders, 0)
    longest = position_ids.shape[1]  # an upper bound is enough; the exact value would wait for the device
    return dict(cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=longest, max_length_k=longest)


def masks_and_documents(
    config: NanochatConfig,
    x: Tensor,
    attention_mask: Tensor | dict[str, Any] | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    borders_given: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """{layer type: mask or None}, and the keyword arguments that keep documents apart where there is no mask.

    x (B, T, C) gives shape, dtype and device. `borders_given`: the caller has passed cu_seq_lens already.
    """
    by_borders = takes_borders(config._attn_implementation)
    # With borders the layers get no positions: transformers would look for documents in them in every layer, even
    # under a mask or a cache.
    documents: dict[str, Any] = {} if by_borders else dict(position_ids=position_ids)
    if isinstance(attention_mask, dict):
        return attention_mask, documents  # generation with a static cache has made both masks
    if by_borders and attention_mask is None and past_key_values is None:
        if position_ids is not None and not borders_given:
            documents = varlen_arguments(position_ids, x.shape[0])
        return dict.fromkeys(("full_attention", "sliding_attention")), documents
    masking: dict[str, Any] = dict(
        config=config,
        inputs_embeds=x,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
    )
    masks = {"full_attention": create_causal_mask(**masking)}
    if "sliding_attention" in config.layer_types:
        masks["sliding_attention"] = create_sliding_window_causal_mask(**masking)
    return masks, documents


class DocumentBorders:
    """What a trainer asks a model about documents in packed rows."""

    config: NanochatConfig

    @property
    def takes_borders(self) -> bool:
        """Whether the attention keeps documents apart by their borders, not by a mask."""
        return takes_borders(self.config._attn_implementation)

    def document_borders(self, position_ids: Tensor | None, device: torch.device | None) -> dict:
        """What `forward` derives from position_ids (B, T), as keywords; {} where the attention takes no borders.

        Computed from positions on the host they need no wait for the device and break no compiled graph.
        """
        if position_ids is None or not self.takes_borders:
            return {}
        return varlen_arguments(position_ids, position_ids.shape[0], device)
