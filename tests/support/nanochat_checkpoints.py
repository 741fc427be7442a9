"""Checkpoints as the original nanochat writes them, and the logits of its formulas."""

import json
import pickle
from itertools import pairwise

import pytest
import tiktoken
import torch
import torch.nn.functional as F

from nanochat_hf.conversation import SPECIAL_TOKENS
from nanochat_hf.tokenizer import SPLIT_PATTERN

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
    """Random weights under the reference's names; the tables in bfloat16, as it keeps them on CUDA."""
    generator = torch.Generator().manual_seed(0)
    C, L = fields["n_embd"], fields["n_layer"]
    KD, V = fields["n_kv_head"] * C // fields["n_head"], -(-fields["vocab_size"] // 64) * 64
    shapes = {"transformer.wte.weight": (V, C), "lm_head.weight": (V, C), "resid_lambdas": (L,), "x0_lambdas": (L,)}
    for i in range(L):
        attention = {"c_q": (C, C), "c_k": (KD, C), "c_v": (KD, C), "c_proj": (C, C)}
        if i % 2 == (L - 1) % 2:
            attention["ve_gate"] = (fields["n_kv_head"], 32)
            shapes[f"value_embeds.{i}.weight"] = (V, KD)
        shapes |= {f"transformer.h.{i}.attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"transformer.h.{i}.mlp.c_fc.weight": (4 * C, C), f"transformer.h.{i}.mlp.c_proj.weight": (C, 4 * C)}
    weights = {
        name: torch.randn(shape, generator=generator) * (1 if len(shape) == 1 else shape[-1] ** -0.5)
        for name, shape in shapes.items()
    }
    return {prefix + n: w.bfloat16() if "wte" in n or "value_embeds" in n else w for n, w in weights.items()}


def formula(weights, fields, ids):
    """Logits (T, V) of the reference's formulas, one sequence, straight from its state dict."""
    w = {name: value.float() for name, value in weights.items()}
    T, C, L, H, K = len(ids), fields["n_embd"], fields["n_layer"], fields["n_head"], fields["n_kv_head"]
    D, query, key = C // H, torch.arange(T)[:, None], torch.arange(T)[None]
    angle = torch.outer(torch.arange(T).float(), 1.0 / 10000 ** (torch.arange(0, D, 2).float() / D))
    cos, sin = angle.cos().bfloat16().float()[:, None], angle.sin().bfloat16().float()[:, None]

    def norm(x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps)

    def turn(x):  # (T, heads, D)
        a, b = x[..., : D // 2], x[..., D // 2 :]
        return norm(torch.cat((a * cos + b * sin, b * cos - a * sin), -1))

    x = x0 = norm(w["transformer.wte.weight"][ids])
    for i in range(L):
        layer = f"transformer.h.{i}."
        x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        y = norm(x)
        q, k, v = ((y @ w[f"{layer}attn.c_{n}.weight"].T).view(T, -1, D) for n in "qkv")
        if f"value_embeds.{i}.weight" in w:
            gate = 2 * torch.sigmoid(y[:, :32] @ w[layer + "attn.ve_gate.weight"].T)
            v = v + gate[..., None] * w[f"value_embeds.{i}.weight"][ids].view(T, K, D)
        long = i == L - 1 or fields["window_pattern"][i % len(fields["window_pattern"])] == "L"
        window = fields["sequence_len"] if long else fields["sequence_len"] // 2
        hidden = (key > query) | (query - key > window)  # itself and `window` positions before it
        q, k, v = turn(q), turn(k).repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
        scores = torch.einsum("thd,shd->hts", q, k) / D**0.5
        y = torch.einsum("hts,shd->thd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v).reshape(T, C)
        x = x + y @ w[layer + "attn.c_proj.weight"].T
        x = x + F.relu(norm(x) @ w[layer + "mlp.c_fc.weight"].T).square() @ w[layer + "mlp.c_proj.weight"].T
    return 15 * torch.tanh((norm(x) @ w["lm_head.weight"].T)[:, : fields["vocab_size"]] / 15)


def write(folder, encoding, weights, fields=FIELDS, step=7):
    folder.mkdir(parents=True)
    meta = {
        "step": step,
        "val_bpb": 1.25,
        "model_config": fields,
        "user_config": {"depth": fields["n_layer"], "run": "naïve"},
    }
    torch.save(weights, folder / f"model_{step:06d}.pt")
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    return folder
