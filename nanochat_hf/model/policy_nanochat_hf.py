"""The loss of reinforcement learning, computed with its gradient chunk by chunk, so that few logits exist at once.

A token's loss is a function of its log-probability log π alone (and, with clip "sequence", of those of its answer). So
its gradient is that of the plain cross-entropy times a number, the weight w = −∂loss/∂log π, which is known once log π
is. The operation that computes cross-entropy need not know that number: it is multiplied into the two products with the
head.

Letters: N tokens, C hidden_size, V vocabulary; x = log π − o, where o is log π when the answer was sampled; ρ = exp(x).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from .loss_nanochat_hf import LossSizes
from .ops_nanochat_hf import Ops, are_plain

CLIPS = ("none", "token", "cispo", "sequence")


class Policy(NamedTuple):
    """What is done about ratios ρ far from 1, and the temperature at which answers were sampled.

    `clip` none: −A·log π. token: −min(ρ·A, clip(ρ, 1 − low, 1 + high)·A), as PPO (arXiv:1707.06347) and GRPO
    (arXiv:2402.03300), with two bounds as DAPO (arXiv:2503.14476). cispo: −min(ρ, 1 + high)·A·log π, with the ratio as
    a constant (arXiv:2506.13585). sequence: as token, with exp(mean x of the answer) in place of ρ, as GSPO
    (arXiv:2507.18071).
    """

    clip: str = "none"
    low: float = 0.2
    high: float = 0.2
    temperature: float = 1.0


class PolicyTokens(NamedTuple):
    """What a batch says of its tokens beside ids and targets. All are (B, T), or (N,) once flattened.

    `answer_ids` number the answers of a micro-batch from 0. `loss_weights` are advantages, times what a normalisation
    other than by tokens makes of them; the tokens of an answer have the same. `old_log_probs` are o (without them ρ is
    1), `start_log_probs` those of the model to stay close to, `kl_weights` the coefficients of the KL term.
    `sampler_log_probs` are for whoever compares; the loss does not use them.
    """

    answer_ids: Tensor
    loss_weights: Tensor
    old_log_probs: Tensor | None = None
    start_log_probs: Tensor | None = None
    kl_weights: Tensor | None = None
    sampler_log_probs: Tensor | None = None

    @classmethod
    def taken(cls, batch: dict[str, Any], loss_weights: Tensor | None) -> "PolicyTokens | None":
        """Remove the keys of reinforcement learning from a batch; None where it has no `answer_ids`."""
        if loss_weights is None or "answer_ids" not in batch:
            return None
        answers = batch.pop("answer_ids")
        return cls(answers, loss_weights, *(batch.pop(name, None) for name in cls._fields[2:]))

    def flat(self) -> "PolicyTokens":
        """The same as (N,), numbers in float32."""
        return PolicyTokens(
            self.answer_ids.flatten(),
            self.loss_weights.flatten().float(),
            *(None if t is None else t.flatten().float() for t in self[2:]),
        )

    def piece(self, place: slice) -> "PolicyTokens":
        """Those of some of the N tokens."""
        return PolicyTokens(
            self.answer_ids[place], self.loss_weights[place], *(None if t is None else t[place] for t in self[2:])
        )


@dataclass
class PolicyOutput(CausalLMOutputWithPast):
    """As CausalLMOutputWithPast, with each target's log-probability and its distribution's entropy (B, T), no grad."""

    log_probs: Tensor | None = None
    entropies: Tensor | None = None


class How(NamedTuple):
    """What PolicyLoss computes by."""

    sizes: LossSizes
    ops: Ops
    policy: Policy


def policy_terms(log_probs: Tensor, x: Tensor, tokens: PolicyTokens, policy: Policy) -> tuple[Tensor, Tensor]:
    """Each token's loss and its weight w = −∂loss/∂log π, both (n,), from log π (n,) and x (n,); without gradients.

    The KL term is ρ·(eᵈ − d − 1) with d = start − log π (k3, joschu.net/blog/kl-approx.html). With ρ before it, the
    gradient is that of KL(π‖start), −ρ·(log π − start).
    """
    a, ratio = tokens.loss_weights, x.exp()
    if policy.clip == "none":
        loss, weight = -a * log_probs, a
    elif policy.clip == "cispo":
        weight = ratio.clamp(max=1 + policy.high) * a
        loss = -weight * log_probs
    else:
        clipped = clipped_tokens(x, a, policy)
        loss = -torch.minimum(ratio * a, ratio.clamp(1 - policy.low, 1 + policy.high) * a)
        weight = (ratio * a).masked_fill(clipped[0] | clipped[1], 0.0)
    if tokens.kl_weights is not None and tokens.start_log_probs is not None:
        d = tokens.start_log_probs - log_probs
        # the token's own ratio, also where x is that of its answer
        own = ratio if tokens.old_log_probs is None else (log_probs - tokens.old_log_probs).exp()
        loss = loss + tokens.kl_weights * own * (d.exp() - d - 1)
        weight = weight + tokens.kl_weights * own * d
    return loss, weight


def clipped_tokens(x: Tensor, advantages: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
    """Where the lower bound cuts a token off, and where the upper one does: two bool (n,)."""
    ratio = x.exp()
    return (ratio < 1 - policy.low) & (advantages < 0), (ratio > 1 + policy.high) & (advantages > 0)


def log_ratios(log_probs: Tensor, tokens: PolicyTokens, trained: Tensor, policy: Policy) -> Tensor:
    """x (N,): log π − o, with clip "sequence" its mean over the answer's `trained` (bool) tokens; without o all 0."""
    if tokens.old_log_probs is None:
        return torch.zeros_like(log_probs)
    x = (log_probs - tokens.old_log_probs).masked_fill(~trained, 0.0)
    if policy.clip != "sequence":
        return x
    # as many sums as there are tokens, which is enough for any number of answers
    sums, counts = torch.zeros_like(x), torch.zeros_like(x)
    sums.index_add_(0, tokens.answer_ids, x)
    counts.index_add_(0, tokens.answer_ids, trained.to(x))
    return (sums / counts.clamp(min=1))[tokens.answer_ids]


def entropy_of(logits: Tensor, cap: float) -> Tensor:
    """Entropy (n,) of the distribution that soft-capped logits (n, V), given before the cap, make."""
    capped = cap * torch.tanh(logits.float() / cap)
    lse = torch.logsumexp(capped, dim=1)
    return lse - (torch.exp(capped - lse.unsqueeze(1)) * capped).sum(1)


class PolicyLoss(torch.autograd.Function):
    """(Σ loss of the tokens, 0-d; log π (N,); entropies (N,)), all float32; only the sum has a gradient.

    hidden (N, C), head (V or more rows, C), targets (N) where −100 is ignored; the rest as PolicyTokens has it.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, head: Tensor, targets: Tensor, how: How, *tokens: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As above; keeps both gradients for backward."""
        sizes, ops, policy = how
        given, trained, x = PolicyTokens(*tokens), targets != -100, None
        h, table = _operands(hidden, head, how)
        with torch.autocast(hidden.device.type, enabled=False):
            if policy.clip == "sequence" and given.old_log_probs is not None:
                # the ratio of an answer needs all its tokens before the first slope: the head once more
                first, _ = _log_probs(h, table, targets, how)
                x = log_ratios(first, given, trained, policy)
            parts = []
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            grad_head = torch.zeros(table.shape, dtype=torch.float32, device=hidden.device)
            for start in range(0, len(h), sizes.chunk):
                piece = slice(start, start + sizes.chunk)
                own = given.piece(piece)
                log_probs, entropies, slope = _chunk(h[piece], table, targets[piece], how)
                ratios = log_ratios(log_probs, own, trained[piece], policy) if x is None else x[piece]
                loss, weight = policy_terms(log_probs, ratios, own, policy)
                total = total + loss.masked_fill(~trained[piece], 0.0).sum()
                weight = weight.masked_fill(~trained[piece], 0.0).unsqueeze(1)
                grad = (slope @ table) * (weight / policy.temperature).to(h.dtype)
                ops.add_product(grad_head, slope.mT, h[piece] * weight.to(h.dtype))
                parts.append((grad.to(hidden.dtype), log_probs, entropies))
        grads, log_probs, entropies = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        ctx.save_for_backward(grads, grad_head)
        ctx.padding, ctx.head_dtype = head.shape[0] - sizes.vocab_size, head.dtype
        ctx.mark_non_differentiable(log_probs, entropies)
        return total, log_probs, entropies

    @staticmethod
    def backward(ctx, grad_output: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradients of hidden (N, C) and head, times that of the sum."""
        grad_hidden, grad_head = ctx.saved_tensors
        grad_head = F.pad((grad_head * grad_output).to(ctx.head_dtype), (0, 0, 0, ctx.padding))
        nothing = (None,) * (2 + len(PolicyTokens._fields))
        return (grad_hidden * grad_output).to(grad_hidden.dtype), grad_head, *nothing


def _chunk(h, table, targets, how):
    # log π, entropies and the slope of cross-entropy of a chunk; cap·tanh(z/cap)/τ = (cap/τ)·tanh((z/τ)/(cap/τ))
    logits, cap = h @ table.mT, how.sizes.cap / how.policy.temperature
    entropies = entropy_of(logits, cap)  # first: the operation may overwrite the logits
    nll, slope = how.ops.nll_and_slope(logits, targets, torch.ones_like(entropies), cap)
    return -nll, entropies, slope


def _operands(hidden, head, how):
    # hidden ÷ temperature, and the rows of the head that are tokens, in the dtype of the products
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return hidden.to(dtype) / how.policy.temperature, head[: how.sizes.vocab_size].to(dtype)


def _log_probs(h, table, targets, how):
    # log π and entropies (N,), with the bits that PolicyLoss computes
    chunks = zip(h.split(how.sizes.chunk), targets.split(how.sizes.chunk), strict=True)
    found = [_chunk(piece, table, target, how)[:2] for piece, target in chunks]
    log_probs, entropies = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    return log_probs, entropies


def policy_loss(
    model: Any, hidden: Tensor, targets: Tensor, tokens: PolicyTokens, sizes: LossSizes
) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ loss of the tokens, log π (B, T), entropies (B, T)) of a causal language model after hidden (B, T, C).

    Where no gradient is wanted the sum is 0: what is asked for are the log-probabilities.
    """
    shape, hidden, targets = targets.shape, hidden.flatten(0, 1), targets.flatten()
    head, how, flat = model.lm_head, How(sizes, model.model.ops, model.policy), tokens.flat()
    if not are_plain(head):
        found = chunked_policy_loss(model.logits, hidden, targets, flat, how.policy, sizes.chunk)
    elif torch.is_grad_enabled():
        found = PolicyLoss.apply(hidden, head.weight, targets, how, *flat)
    else:
        h, table = _operands(hidden, head.weight, how)
        with torch.autocast(hidden.device.type, enabled=False):
            found = hidden.new_zeros(()), *_log_probs(h, table, targets, how)
    return found[0], found[1].view(shape), found[2].view(shape)


def chunked_policy_loss(
    logits: Callable, hidden: Tensor, targets: Tensor, tokens: PolicyTokens, policy: Policy, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As PolicyLoss, for heads that are more than a weight, such as adapters. `logits`: hidden (n, C) → capped (n, V).

    Backward computes each chunk of logits again, so that only one exists at a time.
    """

    def part(hidden, targets):
        spread = F.log_softmax(logits(hidden).float() / policy.temperature, dim=-1)
        chosen = spread.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
        return chosen.masked_fill(targets == -100, 0.0), -(spread.exp() * spread).sum(1).detach()

    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    save = torch.is_grad_enabled() and len(targets) > chunk
    found = [checkpoint(part, *piece, use_reentrant=False) if save else part(*piece) for piece in pieces]
    log_probs, entropies = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    trained, known = targets != -100, log_probs.detach()
    loss, weight = policy_terms(known, log_ratios(known, tokens, trained, policy), tokens, policy)
    # the value of `loss`, the gradient of −w·log π
    total = (loss - weight * (log_probs - known)).masked_fill(~trained, 0.0).sum()
    return total, known, entropies
