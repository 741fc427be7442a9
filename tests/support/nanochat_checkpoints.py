"""Checkpoints as the original nanochat writes them."""

import json
import pickle
from itertools import pairwise

import pytest
import tiktoken
import torch

from nanochat_hf.conversation import SPECIAL_TOKENS
from nanochat_hf.tokenizer import SPLIT_PATTERN
from tests.support import nanochat_eras

TEXT = [
    "The cat sat on the mat, and it counted 12 letters; then the other cat sat there.",
    "naïve café 🙂 Zwölf Boxkämpfer",
] * 4
FIELDS = dict(sequence_len=16, vocab_size=300, n_layer=4, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SSSL")


def merged(texts, size):
    """Ranks of byte pair encoding, learnt naively: an encoding that our own trainer has no part in."""
    pieces = [[bytes([b]) for b in word.encode()] for text in texts for word in text.replace(" ", "\n ").split("\n")]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < size:
        counts = {}
        for piece in pieces:
            for pair in pairwise(piece):
                counts[pair] = counts.get(pair, 0) + 1
        a, b = max(counts, key=lambda pair: (counts[pair], pair))
        ranks[a + b] = len(ranks)
        for piece in pieces:
            i = 0
            while i < len(piece) - 1:
                if (piece[i], piece[i + 1]) == (a, b):
                    piece[i : i + 2] = [a + b]
                i += 1
    return ranks


@pytest.fixture(scope="module")
def encoding():
    ranks = merged(TEXT, FIELDS["vocab_size"] - len(SPECIAL_TOKENS))
    specials = {t: len(ranks) + i for i, t in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding("rustbpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def state_dict(fields, prefix=""):
    """Random weights of February 2026 under the reference's names."""
    return nanochat_eras.state_dict(fields, prefix=prefix)


def formula(weights, fields, ids):
    """Logits (T, V) of the formulas of February 2026, one sequence, straight from its state dict."""
    return nanochat_eras.logits(weights, fields, ids)


def write(folder, encoding, weights, fields=FIELDS, step=7, **more):
    """A checkpoint's folder; `more` are further keys of its meta file."""
    folder.mkdir(parents=True)
    meta = {
        "step": step,
        "val_bpb": 1.25,
        "model_config": fields,
        "user_config": {"depth": fields["n_layer"], "run": "naïve"},
    } | more
    torch.save(weights, folder / f"model_{step:06d}.pt")
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    return folder
