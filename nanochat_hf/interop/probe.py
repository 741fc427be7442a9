"""The loss of a text under several soft-caps: the one that a model was trained with usually gives the lowest."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from ..model import NanochatForCausalLM

ROWS = 8  # of the text that are looked at


@torch.no_grad()
def losses_by_cap(
    model: NanochatForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, caps: Sequence[float]
) -> dict[float, float]:
    """{soft-cap: mean loss in nats a token} of a text, or of the file that `text` names.

    Raises ValueError for a text that is too short to say anything.
    """
    if len(text) < 4096 and Path(text).is_file():
        text = Path(text).read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < 16:
        raise ValueError(f"--probe: the text has {len(ids)} tokens; give a text or a file of some hundred words")
    positions = model.config.max_position_embeddings
    totals, count = dict.fromkeys(caps, 0.0), 0
    for start in range(0, min(len(ids), ROWS * (positions - 1)), positions - 1):
        row = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + positions - 1]]], device=model.device)
        raw = model.lm_head(model.model(row, use_cache=False).last_hidden_state)[0, :-1, : model.config.vocab_size]
        for cap in caps:
            capped = cap * torch.tanh(raw.float() / cap)
            totals[cap] += F.cross_entropy(capped, row[0, 1:], reduction="sum").item()
        count += row.shape[1] - 1
    return {cap: total / count for cap, total in totals.items()}
