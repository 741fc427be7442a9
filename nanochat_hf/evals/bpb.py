"""Bits per byte: a loss that does not depend on the tokenizer, nor on how the text lies in batches."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .scoring import Scorer

CHUNK = 4096  # positions whose float32 logits exist at one time: 512 MiB at V = 32768


@torch.no_grad()  # not inference_mode, which XLA tensors refuse
def evaluate_bpb(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    token_bytes: torch.Tensor,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> float:
    """Σ nats ÷ (ln 2 · Σ bytes) over the counted targets of `batches` (dicts as collate.py makes them).

    Targets of −100 and of zero bytes count in neither sum. `reduce` sums a tensor over ranks. Infinity if there is no
    byte.
    """
    device, scorer = model.device, Scorer(model)
    sizes = token_bytes.to(device)
    # float64 where the device has it, so that the sum does not depend on the batches' geometry
    sums = torch.zeros(2, dtype=torch.float32 if device.type in ("mps", "xla") else torch.float64, device=device)
    for batch in batches:
        batch = {key: value.to(device) for key, value in batch.items()}
        places = {"position_ids": batch["position_ids"]} if "position_ids" in batch else {}
        states = scorer.states(batch["input_ids"], **places).flatten(0, 1)  # (B·T, C)
        targets = batch["shift_labels"].flatten()
        for part, target in zip(states.split(CHUNK), targets.split(CHUNK), strict=True):
            size = torch.where(target >= 0, sizes[target.clamp(min=0)], 0)
            nll = F.cross_entropy(scorer.logits(part), target, ignore_index=-100, reduction="none")
            nats = torch.where(size > 0, nll, 0).sum(dtype=sums.dtype)
            sums += torch.stack((nats, size.sum().to(sums.dtype)))
    nats, count = (reduce(sums) if reduce else sums).tolist()
    return nats / (math.log(2) * count) if count else math.inf


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """The ids of each text; the strings of special tokens are ordinary text. Many at once where the tokenizer can."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    backend.no_truncation()
    backend.no_padding()
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        return [encoded.ids for encoded in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[id] that stands before a text: bos, else the end token (as GPT-2 does), else []."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [] if first is None else [first]


def text_batches(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    positions: int,
    batch_tokens: int = 8192,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of `texts`, each alone in its row, of about `batch_tokens` positions; texts of like length share one.

    A text longer than `positions` continues in further rows that begin anew, so nothing is left out. Rows are padded
    behind, where causal attention never looks from a token that counts. Without a bos or end token a row's first token
    is context only.
    """
    start, windows = beginning(tokenizer), []
    for ids in encode_texts(tokenizer, texts):
        step = positions if start else positions + 1
        windows += [start + ids[i : i + step] for i in range(0, len(ids), step)]
    windows = sorted((w for w in windows if len(w) > 1), key=len)[
        rank::world_size
    ]  # the longest last, to be popped first
    while windows:
        longest = len(windows[-1]) - 1
        rows = [windows.pop() for _ in range(min(len(windows), max(1, batch_tokens // longest)))]
        ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
        for i, row in enumerate(rows):
            ids[i, : len(row) - 1], labels[i, : len(row) - 1] = torch.tensor(row[:-1]), torch.tensor(row[1:])
        yield {"input_ids": ids, "shift_labels": labels}
