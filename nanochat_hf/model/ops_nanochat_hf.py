"""The operations of the model, one table of them, with their plain formulas as the defaults.

The model computes through `ops.NAME(...)` and never asks who answers. A trainer may give the model a table whose entries
compute the same things faster (`NanochatModel.training_ops`); evaluation and generation always use the plain formulas.

An entry takes tensors and sizes, and layers where it multiplies or looks up. It takes the layer and not its weight because
anything may stand in the layer's place: an adapter, a quantised or a float8 layer. A plain formula calls the layer, so it is
right for all of them. A faster entry that reads `layer.weight` must first ask `are_plain`, and call the formula if they are not.

Letters: B rows, T positions, C hidden_size, H query heads, K key/value heads, D head_dim, V vocabulary, n tokens of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Heads(NamedTuple):
    """The layers that make queries, keys and values, and what is done to queries and keys afterwards."""

    q_proj: nn.Module  # C → H·D
    k_proj: nn.Module  # C → K·D
    v_proj: nn.Module  # C → K·D
    head_dim: int
    eps: float | None  # of the norm of queries and keys


class ValueEmbedding(NamedTuple):
    """A second source of values: a row of `table` for each token, let through by a gate for each key/value head."""

    gate: Tensor  # (B, T, K)
    table: nn.Module  # ids → (…, K·D)
    ids: Tensor  # (B, T)


class Attend(NamedTuple):
    """Attention itself, as transformers' interface calls it, and all that a faster entry must know to take its place."""

    call: Callable  # q (B, T, H, D), k and v (B, T, K, D) → result with T·H·D numbers a row, weights or None
    implementation: str  # its name in the config
    whole_rows: bool  # no mask and no cache: a query sees keys of its own row, by `window` and `borders` alone
    scaling: float
    window: int | None  # keys that a query sees, its own among them; None: all before it
    borders: Tensor | None  # int32 offsets of the documents among the B·T tokens; None: each row is one document


def are_plain(*layers: nn.Module) -> bool:
    """Whether these are linear layers or tables as they were made, so that `layer.weight` says all about them."""
    return all(type(layer) in (nn.Linear, nn.Embedding) and type(layer.weight) is nn.Parameter for layer in layers)


def norm(x: Tensor, eps: float | None = None) -> Tensor:
    """RMS norm over the last axis without a weight. eps None is the dtype's own. Autocast may not widen the result."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of x (B, T, heads, D) by −θ. This is the reference's direction, the mirror of transformers' own."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def rope_tables(position_ids: Tensor, head_dim: int, theta: float, rounded: bool) -> Tensor:
    """Cosines and sines (2, B, T, 1, D/2) of positions (B, T). Computed for each call, so no length is too long."""
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angle = position_ids[:, :, None, None].float() * theta**-exponent
    table = torch.stack((angle.cos(), angle.sin()))
    # the reference rounds its tables, and its checkpoints were trained with the rounded values
    return table.bfloat16() if rounded else table


def mix_and_norm(x: Tensor, update: Tensor, x0: Tensor, lambdas: Tensor, eps: float | None, channels: int):
    """The stream before a layer, r·(x + update) + s·x0 with lambdas (r, s), its norm, the norm's first channels, and x0.

    x, update and x0: (B, T, C). x0 is handed back so that a faster entry can add its gradients up from layer to layer.
    """
    resid, skip = lambdas
    x = resid * (x + update) + skip * x0
    normed = norm(x, eps)
    return x, normed, normed[..., :channels], x0


def stream_and_norm(x: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    """x (B, T, C) and its norm. x is handed back so that a faster entry can join both gradients."""
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


def attention(ops: "Ops", x: Tensor, heads: Heads, value: ValueEmbedding | None, rope: Tensor, attend: Attend):
    """Normed x (B, T, C) → what `attend` gives for its queries, keys and values.

    This entry is made of others and gets the table itself: where no faster one is fit for the whole, theirs still are.
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
    → weight·nll (n) float32, the gradient of its sum by the logits (n, V).
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
