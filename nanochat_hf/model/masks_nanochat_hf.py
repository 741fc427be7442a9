"""What keeps packed documents apart: masks for attention that takes masks, borders for attention that takes those.

Letters: B rows, T positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def takes_borders(implementation: str) -> bool:
    """Whether an attention implementation keeps documents apart by their borders (`cu_seq_lens`), not by a mask."""
    known = implementation in ALL_ATTENTION_FUNCTIONS
    return (
        "flash" in implementation or known and getattr(ALL_ATTENTION_FUNCTIONS[implementation], "takes_borders", False)
    )


@torch.compiler.disable  # one break of the graph here, in place of one that the search itself would make
def varlen_arguments(position_ids: Tensor, batch_size: int, device: torch.device | None = None) -> dict:
    """The arguments by which attention keeps packed documents apart: cu_seq_lens and max_length of queries and keys.

    A document begins with each row, and wherever positions (B or 1, T) do not go on by one:
    [[0, 1, 2, 0, 1]] → cu_seq_lens [0, 3, 5]. transformers looks for documents only at B = 1, and again in every layer.
    """
    begins = torch.diff(position_ids, prepend=position_ids[:, :1], dim=-1) != 1  # a row's first difference is 0
    begins = begins.expand(batch_size, -1).flatten().nonzero().flatten()
    borders = F.pad(begins, (0, 1), value=batch_size * position_ids.shape[1]).int()  # (documents + 1)
    borders = borders.to(device, non_blocking=True)
    # otherwise the layers would be compiled again for every other number of documents, dynamic=False or not
    torch._dynamo.maybe_mark_dynamic(borders, 0)
    longest = position_ids.shape[1]  # an upper bound is enough, and does not wait for the device
    return dict(cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=longest, max_length_k=longest)


def masks_and_documents(config, x, attention_mask, position_ids, past_key_values, borders_given: bool):
    """{layer type: mask or None}, and the keyword arguments by which attention without a mask keeps documents apart.

    x (B, T, C) tells shape, dtype and device. `borders_given`: the caller has passed cu_seq_lens already.
    """
    by_borders = takes_borders(config._attn_implementation)
    # borders replace the positions, in which transformers would look for documents in every layer, even under a mask or a cache
    documents = {} if by_borders else dict(position_ids=position_ids)
    if isinstance(attention_mask, dict):
        return attention_mask, documents  # generation with a static cache brings both masks ready made
    if by_borders and attention_mask is None and past_key_values is None:
        if position_ids is not None and not borders_given:
            documents = varlen_arguments(position_ids, x.shape[0])
        return dict.fromkeys(("full_attention", "sliding_attention")), documents
    masking = dict(
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
