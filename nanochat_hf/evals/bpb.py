"""Bits per byte: a loss that does not depend on the tokenizer."""

import math

import torch
import torch.nn.functional as F


@torch.no_grad()  # not inference_mode, which XLA tensors refuse
def evaluate_bpb(model, batches, token_bytes, reduce=None):
    """Σ nats ÷ (ln 2 · Σ bytes) over the counted targets of `batches` (dicts as collate.py makes them).

    Targets of −100 and of zero bytes count in neither sum. `reduce` sums a tensor over ranks. Infinity if there is no byte.
    """
    device = model.device
    sizes = token_bytes.to(device)
    # float64 where the device has it, so that the sum does not depend on the batches' geometry
    sums = torch.zeros(2, dtype=torch.float32 if device.type in ("mps", "xla") else torch.float64, device=device)
    for batch in batches:
        batch = {key: value.to(device) for key, value in batch.items()}
        targets = batch["shift_labels"]
        logits = model(input_ids=batch["input_ids"], position_ids=batch.get("position_ids"), use_cache=False).logits
        nll = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        size = torch.where(targets.flatten() >= 0, sizes[targets.flatten().clamp(min=0)], 0)
        sums += torch.stack(((nll * (size > 0)).sum(dtype=sums.dtype), size.sum().to(sums.dtype)))
    nats, count = (reduce(sums) if reduce else sums).tolist()
    return nats / (math.log(2) * count) if count else math.inf
