"""PackingCollator: planned rows → tensors of one fixed shape."""

import numpy as np
import torch


class PackingCollator:
    """Lays rows of documents {"ids", "mask"} out as {input_ids, shift_labels, position_ids}, int64 (B, positions).

    A row holds up to positions + 1 tokens, as inputs [:-1] and targets [1:]. Targets with mask 0, and padding, are −100; mask None
    trains all. With `isolate`, position_ids restart per document, so that documents cannot see each other. Padding is a document
    of its own: it attends to itself and nothing real attends to it. ValueError for a row that is too long.

    PackingCollator(5, pad_token_id=9)([[{"ids": [1, 2, 3], "mask": [0, 1, 1]}, {"ids": [1, 4], "mask": [0, 1]}]]) →
    input_ids [[1, 2, 3, 1, 4]], shift_labels [[2, 3, −100, 4, −100]], position_ids [[0, 1, 2, 0, 1]]
    """

    def __init__(self, positions, pad_token_id, isolate=True):
        self.positions, self.pad_token_id, self.isolate = positions, pad_token_id, isolate

    def __call__(self, rows):
        width = self.positions + 1
        # numpy, and whole rows at a time: a torch call costs microseconds, and a document holds only some hundred tokens
        ids = np.full((len(rows), width), self.pad_token_id, dtype=np.int64)
        labels = np.full((len(rows), width), -100, dtype=np.int64)
        places = np.zeros((len(rows), width), dtype=np.int64)
        for r, row in enumerate(rows):
            lengths = [len(document["ids"]) for document in row]
            total = sum(lengths)
            if total > width:
                raise ValueError(
                    f"row {r} holds {total} tokens, more than positions + 1 = {width}; plan rows with that capacity"
                )
            if total:
                ids[r, :total] = np.concatenate([document["ids"] for document in row])
                labels[r, :total] = np.where(_mask(row, lengths), ids[r, :total], -100)
            places[r] = np.arange(width)
            starts = np.concatenate(([0], np.cumsum(lengths)))  # the last start is the padding's
            if self.isolate:
                places[r] -= np.repeat(starts, [*lengths, width - total])
            else:
                places[r, total:] -= total
        return {
            "input_ids": torch.from_numpy(ids[:, :-1].copy()),
            "shift_labels": torch.from_numpy(labels[:, 1:].copy()),
            "position_ids": torch.from_numpy(places[:, :-1].copy()),
        }


def _mask(row, lengths):
    masks = [document.get("mask") for document in row]
    if all(mask is None for mask in masks):
        return np.True_
    return np.concatenate(
        [
            np.ones(n, dtype=bool) if m is None else np.asarray(m, dtype=bool)
            for m, n in zip(masks, lengths, strict=True)
        ]
    )
