"""The numbers of reinforcement learning, under the names that TRL gives them; averages over the steps between logs."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from nanochat_hf.model.policy_nanochat_hf import Policy, PolicyTokens, clipped_tokens, log_ratios

from .answers import Answer, Group

# sums over the trained tokens of this process
TOKEN_SUMS = ("tokens", "entropy", "kl", "low", "high", "difference")


def rollout_metrics(groups: Sequence[Group], names: Sequence[str]) -> dict[str, float]:
    """What the answers of a step say, of all groups that were drawn, also those that taught nothing.

    `names`: of the rewards. Lengths count what the model wrote, the end included. `reward_std` is over all answers, not
    within groups, as TRL has it. A mean of no values is left out.
    """
    answers = [answer for group in groups for answer in group.answers]
    lengths = [answer.length for answer in answers]
    ended = [answer.length for answer in answers if answer.finished]
    found: dict[str, float] = {
        "frac_reward_zero_std": 1 - sum(group.mixed for group in groups) / len(groups),
        "completions/clipped_ratio": 1 - len(ended) / len(answers),
        "tools/call_frequency": sum(map(tool_outputs, answers)) / len(answers),
        "rewards/errors": sum(bool(answer.graded.errors) for answer in answers),
        "rewards/forged": sum(answer.forged for answer in answers),
    }
    found |= spread("reward", [answer.reward for answer in answers])
    for name in names:
        values = spread("", [answer.graded.parts.get(name, np.nan) for answer in answers])
        found |= {f"rewards/{name}/{'std' if key else 'mean'}": value for key, value in values.items()}
    for key, values in (("length", lengths), ("terminated_length", ended)):
        if values:
            found |= {
                f"completions/mean_{key}": float(np.mean(values)),
                f"completions/min_{key}": min(values),
                f"completions/max_{key}": max(values),
            }
    return found


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean and deviation (over n − 1) of the values that are known.

    >>> spread("reward", [1.0, float("nan"), 3.0])
    {'reward': 2.0, 'reward_std': 1.4142135623730951}
    """
    known = np.array([value for value in values if not np.isnan(value)])
    if not len(known):
        return {}
    return {name: float(known.mean()), f"{name}_std": float(known.std(ddof=1)) if len(known) > 1 else 0.0}


def tool_outputs(answer: Answer) -> int:
    """Times that a tool wrote into an answer.

    >>> tool_outputs(Answer(ids=(1, 2, 3, 4), trained=(True, False, False, True), text="", finished=True))
    1
    """
    before = (True, *answer.trained[:-1])
    return sum(was and not now for was, now in zip(before, answer.trained, strict=True))


class RolloutMetrics:
    """Collects what steps say until it is logged.

    `observe` is called with each micro-batch and the model's output. It adds up on the device, which nobody waits for.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.clear()
        self.tokens_seen = 0  # prompts and answers of the whole run, of all processes

    def clear(self) -> None:
        """Begin anew, after a log entry."""
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.on_tokens: torch.Tensor | None = None  # TOKEN_SUMS
        self.largest: torch.Tensor | None = None

    def add(self, values: dict[str, float]) -> None:
        """Take in the numbers of one step."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
            self.counts[name] = self.counts.get(name, 0) + 1

    @torch.no_grad()
    def observe(self, batch: dict[str, torch.Tensor], output: Any) -> None:
        """Add up what a micro-batch's tokens say, from tensors that lie on the device already."""
        if output.log_probs is None:
            return
        labels, log_probs = batch["shift_labels"].flatten(), output.log_probs.flatten()
        tokens = PolicyTokens.taken(dict(batch), batch["loss_weights"])
        assert tokens is not None  # every batch of rollouts has answer_ids
        flat, trained = tokens.flat(), labels != -100
        x = log_ratios(log_probs, flat, trained, self.policy)
        low, high = clipped_tokens(x, flat.loss_weights, self.policy)
        if self.policy.clip == "cispo":  # it cuts from above, whatever the advantage
            low, high = torch.zeros_like(low), x.exp() > 1 + self.policy.high
        elif self.policy.clip == "none":
            low = high = torch.zeros_like(low)
        kl = torch.zeros_like(x)
        if flat.start_log_probs is not None:
            d = flat.start_log_probs - log_probs
            kl = d.exp() - d - 1
        apart = torch.zeros_like(x) if flat.sampler_log_probs is None else (log_probs - flat.sampler_log_probs).abs()
        columns = torch.stack(
            (torch.ones_like(x), output.entropies.flatten().float(), kl, low.to(x), high.to(x), apart)
        )
        columns = columns.masked_fill(~trained, 0.0)
        wide = torch.float32 if x.device.type in ("xla", "mps") else torch.float64
        sums, largest = columns.to(wide).sum(1), columns[-1].max()
        self.on_tokens = sums if self.on_tokens is None else self.on_tokens + sums
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)

    def values(self, reduce: Callable[[torch.Tensor], torch.Tensor], world_size: int = 1) -> dict[str, float]:
        """The averages since the last call, of all processes, which must all call; then begin anew.

        `reduce` sums a tensor over the processes.
        """
        found = {name: total / self.counts[name] for name, total in self.sums.items()}
        found |= self._token_values(reduce, world_size) | {"num_tokens": self.tokens_seen}
        self.clear()
        return found

    def _token_values(self, reduce, world_size):
        if self.on_tokens is None or self.largest is None:
            return {}
        total, *sums = reduce(self.on_tokens).tolist()
        if not total:
            return {}
        entropy, kl, low, high, apart = (value / total for value in sums)
        found = {
            "entropy": entropy,
            "kl": kl,
            "sampling/sampling_logp_difference/mean": apart,
            # the largest of each process, averaged: a sum is all that every kind of device can do
            "sampling/sampling_logp_difference/max": reduce(self.largest.reshape(1)).item() / world_size,
        }
        if self.policy.clip == "cispo":
            return found | {"cispo_clip_ratio": high}
        return found | {
            "clip_ratio/low_mean": low,
            "clip_ratio/high_mean": high,
            "clip_ratio/region_mean": low + high,
        }

    def state_dict(self) -> dict[str, Any]:
        """What was collected since the last log entry, of this process."""
        return {
            "sums": dict(self.sums),
            "counts": dict(self.counts),
            "on_tokens": None if self.on_tokens is None else self.on_tokens.cpu(),
            "largest": None if self.largest is None else self.largest.cpu(),
            "tokens_seen": self.tokens_seen,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a state_dict."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])
        self.on_tokens = None if state["on_tokens"] is None else state["on_tokens"].to(device)
        self.largest = None if state["largest"] is None else state["largest"].to(device)
        self.tokens_seen = int(state["tokens_seen"])
