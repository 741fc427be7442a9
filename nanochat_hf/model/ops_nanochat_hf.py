"""The operations of the model, one table of them, with their plain formulas as the defaults.

The model calls `ops.NAME(...)` and does not know which code computes it. A trainer may give the model a table whose
entries compute the same things faster (`NanochatModel.training_ops`). Evaluation and generation always use the
formulas.

An entry takes tensors and sizes, and a layer where it multiplies or looks up. It takes the layer and not its weight,
because a library may have replaced the layer by an adapter, a quantised or a float8 layer. A formula calls the layer,
so it is right for all of them. A faster entry that reads `layer.weight` must first check `are_plain`, and call the
formula where that is false.

Letters: B rows, T positions, C hidden_size, H query heads, K key/value heads, D head_dim, V vocabulary,
n tokens of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Heads(NamedTuple):
    """The layers that make queries, keys and values, and the settings of the norm of queries and keys."""

    q_proj: nn.Module  # C → H·D
    k_proj: nn.Module  # C → K·D
    v_proj: nn.Module  # C → K·D
    head_dim: int
    eps: float | None  # of the norm of queries and keys


class ValueEmbedding(NamedTuple):
    """A second source of values: a row of `table` for each token, times a gate for each key/value head."""

    gate: Tensor  # (B, T, K)
    table: nn.Module  # ids → (…, K·D)
    ids: Tensor  # (B, T)


class Attend(NamedTuple):
    """Attention as transformers' interface calls it, and all that a faster entry must know to replace it."""

    call: Callable  # q (B, T, H, D), k and v (B, T, K, D) → result with T·H·D elements a row, weights or None
    implementation: str  # its name in the config
    whole_rows: bool  # no mask and no cache: `window` and `borders` alone say which keys a query sees
    scaling: float
    window: int | None  # number of keys that a query sees, its own included; None: its own and all before
    borders: Tensor | None  # int32 offsets of the documents among the B·T tokens; None: each row is one document


def are_plain(*layers: nn.Module) -> bool:
    """Whether no library has replaced or wrapped these layers, so that `layer.weight` is all there is to them."""
    return all(type(layer) in (nn.Linear, nn.Embedding) and type(layer.weight) is nn.Parameter for layer in layers)


def norm(x: Tensor, eps: float | None = None) -> Tensor:
    """RMS norm over the last axis, without a weight, in x's dtype also under autocast. eps None: the dtype's own."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of x (B, T, heads, D) by −θ, as nanochat does; transformers rotates by +θ."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def rope_tables(position_ids: Tensor, head_dim: int, theta: float, rounded: bool) -> Tensor:
    """Cosines and sines (2, B, T, 1, D/2) of positions (B, T). Computed for each call, so any length works."""
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angle = position_ids[:, :, None, None].float() * theta**-exponent
    table = torch.stack((angle.cos(), angle.sin()))
    # the reference rounds its tables, and its checkpoints were trained with the rounded values
    return table.bfloat16() if rounded else table


def mix_and_norm(
    x: Tensor, update: Tensor, x0: Tensor, lambdas: Tensor, eps: float | None, channels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stream before a layer, its norm, the norm's first `channels`, and x0.

    The stream is r·(x + update) + s·x0 with lambdas (r, s). x, update and x0: (B, T, C). x0 is returned so that a
    faster entry can sum its gradients from layer to layer.
    """
    resid, skip = lambdas
    x = resid * (x + update) + skip * x0
    normed = norm(x, eps)
    return x, normed, normed[..., :channels], x0


def stream_and_norm(x: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    """x (B, T, C) and its norm. x is returned so that a faster entry can sum both gradients."""
    return x, norm(x, eps)


def queries_keys_values(x: Tensor, heads: Heads, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normed x (B, T, C) → q (B, T, H, D), k and v (B, T, K, D); q and k are rotated, then normed."""
    q, k, v = (layer(x).unflatten(-1, (-1, heads.head_dim)) for layer in heads[:3])
    cos, sin = rope.to(q.dtype)
    # norm after RoPE, so that attention logits stay bounded (arXiv:2302.05442)
    return norm(rotate(q, cos, sin), heads.eps), norm(rotate(k, cos, sin), heads.eps), v


def gated_rows(gate: Tensor, table: nn.Module, ids: Tensor) -> Tensor:
    """gate (B, T, K) · table[ids] (B, T, K·D) → (B, T, K, D)."""
    return gate.unsqueeze(-1) * table(ids).to(gate).unflatten(-1, (gate.shape[-1], -1))


def attention(
    ops: "Ops", x: Tensor, heads: Heads, value: ValueEmbedding | None, rope: Tensor, attend: Attend
) -> tuple[Tensor, Tensor | None]:
    """Normed x (B, T, C) → the result of `attend` for its queries, keys and values.

    This entry calls others of the table, and gets the table for that. So where no kernel computes all of it, kernels
    may still compute the parts.
    """
    q, k, v = ops.queries_keys_values(x, heads, rope)
    if value is not None:
        v = v + ops.gated_rows(*value).to(v.dtype)
    return attend.call(q, k, v)


def project_and_add(y: Tensor, o_proj: nn.Module, stream: Tensor) -> Tensor:
    """stream (B, T, C) + o_proj(y), y (B, T, H·D)."""
    return stream + o_proj(y)


def squared_relu_mlp(x: Tensor, up_proj: nn.Module, down_proj: nn.Module) -> Tensor:
    """x (B, T, C) → down_proj(relu(up_proj(x))²)."""
    return down_proj(F.relu(up_proj(x)).square())


def nll_and_slope(logits: Tensor, target: Tensor, weight: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of soft-capped logits, and its gradient.

    logits (n, V) before the cap, which a faster entry may overwrite; target (n), −100 is ignored; weight (n) float32
    → weight·nll (n) float32, and the gradient of its sum with respect to the logits (n, V).
    """
    weight = torch.where(target == -100, 0.0, weight).unsqueeze(1)
    target = target.clamp(min=0).unsqueeze(1)  # (n, 1)
    squashed = torch.tanh(logits.float() / cap)
    lse = torch.logsumexp(cap * squashed, dim=1, keepdim=True)
    nll = (lse - cap * squashed.gather(1, target)) * weight
    wrong = torch.exp(cap * squashed - lse) - (torch.arange(logits.shape[1], device=target.device) == target).float()
    return nll.squeeze(1), (wrong * weight * (1 - squashed.square())).to(logits.dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (n, m) float32 += a (n, k) · b (k, m)."""
    total += (a @ b).float()


@dataclass(frozen=True)
class Ops:
    """One callable for each operation. The defaults are the formulas above; their docstrings are the contract."""

    rope_tables: Callable = rope_tables
    mix_and_norm: Callable = mix_and_norm
    stream_and_norm: Callable = stream_and_norm
    queries_keys_values: Callable = queries_keys_values
    gated_rows: Callable = gated_rows
    attention: Callable = attention
    project_and_add: Callable = project_and_add
    squared_relu_mlp: Callable = squared_relu_mlp
    nll_and_slope: Callable = nll_and_slope
    add_product: Callable = add_product


PLAIN = Ops()
