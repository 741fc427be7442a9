"""PackingCollator: planned rows → tensors of one fixed shape."""

import torch


class PackingCollator:
    """Lays rows of documents {"ids", "mask"} out as {input_ids, shift_labels, position_ids}, int64 (B, positions).

    A row holds up to positions + 1 tokens, as inputs [:-1] and targets [1:]. Targets with mask 0, and padding, are −100; mask None
    trains all. With `isolate`, position_ids restart per document, so that documents cannot see each other. Padding is a document
    of its own: it attends to itself and nothing real attends to it.
    """

    def __init__(self, positions, pad_token_id, isolate=True):
        self.positions, self.pad_token_id, self.isolate = positions, pad_token_id, isolate

    def __call__(self, rows):
        shape = (len(rows), self.positions + 1)
        ids, labels = torch.full(shape, self.pad_token_id), torch.full(shape, -100)
        places = torch.zeros(shape, dtype=torch.long)
        for r, row in enumerate(rows):
            start = 0
            for document in row:
                tokens = torch.as_tensor(document["ids"])
                part = slice(start, start + len(tokens))
                ids[r, part] = tokens
                mask = document.get("mask")
                labels[r, part] = tokens if mask is None else torch.where(torch.as_tensor(mask).bool(), tokens, -100)
                places[r, part] = torch.arange(len(tokens)) + (0 if self.isolate else start)
                start = part.stop
            places[r, start:] = torch.arange(shape[1] - start)
        return {
            "input_ids": ids[:, :-1].contiguous(),
            "shift_labels": labels[:, 1:].contiguous(),
            "position_ids": places[:, :-1].contiguous(),
        }
