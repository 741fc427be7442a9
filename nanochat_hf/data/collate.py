"""Stop 5: planned rows → tensors of one fixed shape."""

from collections.abc import Sequence

import numpy as np
import torch

from .documents import Document

Batch = dict[str, torch.Tensor]


class PackingCollator:
    """Lays rows of documents {"ids", "mask"} out as {input_ids, shift_labels, position_ids}, int64 (B, positions).

    A row holds up to positions + 1 tokens: the inputs are [:-1], the targets [1:]. A target with mask 0 is −100, and so
    is padding; with mask None every token is a target. With `isolate`, position_ids restart at each document, so that
    documents cannot see each other. Padding counts as a document of its own, so no real token attends to it.
    ValueError for a row that is too long.

    With `weighted`, and whenever a document has "factors", the batch has loss_weights too, float32 (B, positions), by
    which each target's loss is multiplied. A token whose factor is 0 is no target.

    >>> row = [{"ids": [1, 2, 3], "mask": [0, 1, 1]}, {"ids": [1, 4], "mask": [0, 1]}]
    >>> made = PackingCollator(5, pad_token_id=9)([row])
    >>> made["input_ids"].tolist(), made["shift_labels"].tolist(), made["position_ids"].tolist()
    ([[1, 2, 3, 1, 4]], [[2, 3, -100, 4, -100]], [[0, 1, 2, 0, 1]])
    """

    def __init__(self, positions: int, pad_token_id: int, isolate: bool = True, weighted: bool = False) -> None:
        self.positions, self.pad_token_id, self.isolate, self.weighted = positions, pad_token_id, isolate, weighted

    def __call__(self, rows: Sequence[Sequence[Document]]) -> Batch:
        """The batch of some rows of documents."""
        width = self.positions + 1
        # numpy on whole rows: a torch call costs microseconds, too much for documents of a few hundred tokens each
        ids = np.full((len(rows), width), self.pad_token_id, dtype=np.int64)
        labels = np.full((len(rows), width), -100, dtype=np.int64)
        places = np.zeros((len(rows), width), dtype=np.int64)
        weighted = self.weighted or any("factors" in document for row in rows for document in row)
        factors = np.ones((len(rows), width), dtype=np.float32) if weighted else None
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
            if factors is not None:
                factors[r, :total] = _factors(row, lengths)
                labels[r][factors[r] == 0] = -100
            places[r] = np.arange(width)
            starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))  # the last start is the padding's
            if self.isolate:
                places[r] -= np.repeat(starts, [*lengths, width - total])
            else:
                places[r, total:] -= total
        batch = {
            "input_ids": torch.from_numpy(ids[:, :-1].copy()),
            "shift_labels": torch.from_numpy(labels[:, 1:].copy()),
            "position_ids": torch.from_numpy(places[:, :-1].copy()),
        }
        return batch if factors is None else batch | {"loss_weights": torch.from_numpy(factors[:, 1:].copy())}


def _mask(row: Sequence[Document], lengths: list[int]) -> np.ndarray | np.bool_:
    masks = [document.get("mask") for document in row]
    if all(mask is None for mask in masks):
        return np.True_
    return np.concatenate(
        [
            np.ones(n, dtype=bool) if m is None else np.asarray(m, dtype=bool)
            for m, n in zip(masks, lengths, strict=True)
        ]
    )


def _factors(row: Sequence[Document], lengths: list[int]) -> np.ndarray:
    each = [
        np.asarray(d["factors"]) if "factors" in d else np.ones(n, np.float32)
        for d, n in zip(row, lengths, strict=True)
    ]
    return np.concatenate([*each, np.zeros(0, np.float32)])
