"""Logits → next tokens, each row by its own random numbers. Letters: N rows, V vocabulary."""

import math
import random
from collections.abc import Sequence

import torch


def check_sampling(
    *,
    max_new_tokens: int = 1,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_samples: int = 1,
) -> None:
    """Raise ValueError, with value and remedy, for settings that nothing can be sampled with."""
    for name, value in (("max_new_tokens", max_new_tokens), ("num_samples", num_samples)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value} must be a whole number of at least 1")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(
            f"temperature={temperature} must be 0 (greedy) or above; 1 samples from the model's own probabilities"
        )
    if top_k is not None and (not isinstance(top_k, int) or top_k < 0):
        raise ValueError(
            f"top_k={top_k} must be a whole number of at least 1; leave it out (or 0) to sample among all tokens"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie above 0 and up to 1; leave it out to sample among all tokens")


def sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor | None,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """Next ids (N,) from logits (N, V): greedy at temperature 0, else among the top_k and the nucleus top_p of those.

    Each of the `uniforms` (N,), in [0, 1), decides its own row by inverting the cumulative distribution. So a row's
    sample does not depend on the other rows, as it would if all rows drew from one generator. Greedy needs none.
    """
    if temperature == 0:
        return logits.argmax(-1)
    assert uniforms is not None
    logits = logits.float()
    # the greatest becomes 0 before the division, so that no temperature, however small, overflows
    logits, candidates = (logits - logits.amax(-1, keepdim=True)) / temperature, None
    nucleus = top_p is not None and top_p < 1
    if top_k or nucleus:
        size = logits.shape[-1]
        logits, candidates = logits.topk(min(top_k or size, size))  # in falling order, as the nucleus needs them
    # float64, where the device has it: over a large vocabulary float32 sums would lose the rare tokens
    weights = logits.softmax(-1, dtype=torch.float32 if logits.device.type == "mps" else torch.float64)
    if nucleus:
        weights = weights.masked_fill(weights.cumsum(-1) - weights >= top_p, 0)
    cumulative = weights.cumsum(-1)
    wanted = uniforms.to(weights).clamp(max=1 - 1e-6)[:, None] * cumulative[:, -1:]
    # the first entry whose cumulative weight exceeds `wanted`, so a token of weight 0 is never taken
    index = torch.searchsorted(cumulative, wanted, right=True).clamp(max=weights.shape[-1] - 1)
    return (index if candidates is None else candidates.gather(-1, index))[:, 0]


class Sampler:
    """How the rows of a batch sample: the settings, and each row's own random numbers.

    `uniforms` is (N, steps), or None when greedy.
    """

    def __init__(
        self,
        uniforms: torch.Tensor | None,
        temperature: float,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> None:
        self.uniforms, self.settings, self.step = uniforms, (temperature, top_k, top_p), 0

    def sample(self, logits: torch.Tensor, uniforms: torch.Tensor | None) -> torch.Tensor:
        """Next ids (N,) from logits (N, V) and one number a row."""
        return sample(logits, uniforms, *self.settings)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Next ids (N,), by the next number of every row."""
        drawn = None if self.uniforms is None else self.uniforms[:, self.step]
        self.step += 1
        return self.sample(logits, drawn)

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but those with these numbers."""
        self.uniforms = None if self.uniforms is None else self.uniforms[rows]


def draw_uniforms(seed: int | Sequence[int], prompts: int, samples: int, steps: int) -> torch.Tensor:
    """Uniform numbers (prompts·samples, steps), of which row (i, j) depends on `seed`, i and j only.

    With a list of seeds, one a prompt, it depends on seed[i] and j only.
    """
    if not isinstance(seed, int) and len(seed) != prompts:
        raise ValueError(f"seed has {len(seed)} entries for {prompts} prompts; give one int, or one for each prompt")
    keys = [(seed, i) if isinstance(seed, int) else (seed[i], 0) for i in range(prompts)]
    return torch.stack([row_uniforms(key, i, j, steps) for key, i in keys for j in range(samples)])


def row_uniforms(seed: int | str, prompt: int, sample: int, steps: int) -> torch.Tensor:
    """Uniform numbers (steps,) that depend on the three keys only; fewer steps are a prefix of more."""
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {prompt} {sample}").getrandbits(63))
    return torch.rand(steps, generator=generator)
