"""nanochat's forward pass at each of its dates, from its formulas alone: tensors by their names there → logits."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Era:
    """What changed from date to date. `parts` of a sequence are a window, in blocks of `block` positions."""

    cap: float = 15.0
    gate_channels: int = 32
    gate_factor: float = 2.0
    qk: float = 1.0
    base: float = 10000.0
    parts: int = 2
    block: int = 1
    smear: bool = False
    rounded: bool = True  # cosines and sines are bfloat16 also where all else is float32


ERAS = {
    "feb2026": Era(),
    "mar2026-cap20": Era(cap=20.0, rounded=False),
    "mar2026-gates": Era(gate_channels=12, gate_factor=3.0, qk=1.15, base=1e5, parts=3, block=128, rounded=False),
    "mar2026": Era(15.0, 12, 3.0, 1.2, 1e5, 4, 128, True, False),
}


def state_dict(fields, era=ERAS["feb2026"], prefix=""):
    """Random weights under the reference's names; the tables in bfloat16, as it keeps them on CUDA."""
    generator = torch.Generator().manual_seed(0)
    C, L = fields["n_embd"], fields["n_layer"]
    KD, V = fields["n_kv_head"] * C // fields["n_head"], -(-fields["vocab_size"] // 64) * 64
    shapes = {"transformer.wte.weight": (V, C), "lm_head.weight": (V, C), "resid_lambdas": (L,), "x0_lambdas": (L,)}
    if era.smear:
        shapes |= {"smear_gate.weight": (1, 24), "smear_lambda": (1,), "backout_lambda": (1,)}
    for i in range(L):
        attention = {"c_q": (C, C), "c_k": (KD, C), "c_v": (KD, C), "c_proj": (C, C)}
        if i % 2 == (L - 1) % 2:
            attention["ve_gate"] = (fields["n_kv_head"], era.gate_channels)
            shapes[f"value_embeds.{i}.weight"] = (V, KD)
        shapes |= {f"transformer.h.{i}.attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"transformer.h.{i}.mlp.c_fc.weight": (4 * C, C), f"transformer.h.{i}.mlp.c_proj.weight": (C, 4 * C)}
    weights = {
        name: torch.randn(shape, generator=generator) * (1 if len(shape) == 1 else shape[-1] ** -0.5)
        for name, shape in shapes.items()
    }
    return {prefix + n: w.bfloat16() if "wte" in n or "value_embeds" in n else w for n, w in weights.items()}


def norm(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps)


def angles(positions, width, era):
    """Cosines and sines, each (T, 1, D/2)."""
    angle = torch.outer(torch.arange(positions).float(), 1.0 / era.base ** (torch.arange(0, width, 2).float() / width))
    pair = angle.cos()[:, None], angle.sin()[:, None]
    return [t.bfloat16().float() for t in pair] if era.rounded else pair


def short(positions, era):
    """Positions that a short window holds before the query's own."""
    if era.block == 1:
        return positions // era.parts
    return era.block * -(-positions // (era.parts * era.block))


def attention(w, layer, y, ids, fields, era, hidden):
    """Normed y (T, C) → the attention's output (T, C)."""
    T, C, H, K = len(ids), fields["n_embd"], fields["n_head"], fields["n_kv_head"]
    D = C // H
    cos, sin = angles(T, D, era)

    def turn(x):  # (T, heads, D)
        a, b = x[..., : D // 2], x[..., D // 2 :]
        return era.qk * norm(torch.cat((a * cos + b * sin, b * cos - a * sin), -1))

    q, k, v = ((y @ w[f"transformer.h.{layer}.attn.c_{n}.weight"].T).view(T, -1, D) for n in "qkv")
    if f"value_embeds.{layer}.weight" in w:
        gate = w[f"transformer.h.{layer}.attn.ve_gate.weight"]
        gate = era.gate_factor * torch.sigmoid(y[:, : era.gate_channels] @ gate.T)
        v = v + gate[..., None] * w[f"value_embeds.{layer}.weight"][ids].view(T, K, D)
    q, k, v = turn(q), turn(k).repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
    scores = torch.einsum("thd,shd->hts", q, k) / D**0.5
    y = torch.einsum("hts,shd->thd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v).reshape(T, C)
    return y @ w[f"transformer.h.{layer}.attn.c_proj.weight"].T


def logits(weights, fields, ids, era=ERAS["feb2026"]):
    """Logits (T, V) of one sequence of ids (T), straight from a state dict."""
    w = {name: value.float() for name, value in weights.items()}
    L, pattern = fields["n_layer"], fields["window_pattern"]
    query, key = torch.arange(len(ids))[:, None], torch.arange(len(ids))[None]
    x = norm(w["transformer.wte.weight"][ids])
    if era.smear:
        gate = torch.sigmoid(x[1:, :24] @ w["smear_gate.weight"].T)
        x = torch.cat((x[:1], x[1:] + w["smear_lambda"] * gate * x[:-1]))
    x0 = x
    for i in range(L):
        x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        whole = i == L - 1 or pattern[i % len(pattern)] == "L"
        window = fields["sequence_len"] if whole else short(fields["sequence_len"], era)
        hidden = (key > query) | (query - key > window)  # itself and `window` positions before it
        x = x + attention(w, i, norm(x), ids, fields, era, hidden)
        up = F.relu(norm(x) @ w[f"transformer.h.{i}.mlp.c_fc.weight"].T).square()
        x = x + up @ w[f"transformer.h.{i}.mlp.c_proj.weight"].T
        if era.smear and i == L // 2:
            middle = x
    if era.smear:
        x = x - w["backout_lambda"] * middle
    raw = (norm(x) @ w["lm_head.weight"].T)[:, : fields["vocab_size"]]
    return era.cap * torch.tanh(raw / era.cap)
