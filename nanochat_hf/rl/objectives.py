"""What an answer's reward becomes: its advantage, and the factor of each of its tokens' loss. Pure, in float64.

Letters: G answers to a question; M answers and N trained tokens of a step, n tokens of one answer; r rewards. A reward
that is NaN is unknown: its answer has no part in the mean, and its advantage is 0.
"""

from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray
EPSILON = 1e-4  # beside a standard deviation, as TRL has it; verl and tunix take 1e-6


def mean(rewards: Array) -> Array:
    """r − r̄, of one question's rewards (G,). Dr. GRPO (arXiv:2503.20783), and the reference.

    >>> mean(np.array([1.0, 0.0, 0.0])).round(4).tolist()
    [0.6667, -0.3333, -0.3333]
    """
    return rewards - rewards.mean()


def deviation(rewards: Array, epsilon: float = EPSILON) -> Array:
    """(r − r̄) ÷ (s + ε), s over G − 1. GRPO (arXiv:2402.03300).

    >>> deviation(np.array([1.0, 0.0, 0.0]), epsilon=0).round(4).tolist()
    [1.1547, -0.5774, -0.5774]
    """
    return mean(rewards) / (rewards.std(ddof=1) + epsilon)


def leave_one_out(rewards: Array) -> Array:
    """r minus the mean of the other rewards, (r − r̄)·G ÷ (G − 1). RLOO (arXiv:2402.14740).

    >>> leave_one_out(np.array([1.0, 0.0, 0.0])).tolist()
    [1.0, -0.5, -0.5]
    """
    return mean(rewards) * len(rewards) / (len(rewards) - 1)


ADVANTAGES: dict[str, Callable[[Array], Array]] = {
    "mean": mean,
    "deviation": deviation,
    "leave_one_out": leave_one_out,
}


def is_mixed(rewards: Array) -> bool:
    """Whether the known rewards of a question differ: only then is there something to learn.

    The smallest and the largest of all decide. A mean that leaves one out would drop the only loser of a group.
    """
    known = rewards[~np.isnan(rewards)]
    return len(known) > 1 and bool(known.max() > known.min())


def advantages(rewards: Array, kind: str) -> Array:
    """Advantages (G,) of one question's rewards (G,), by one of ADVANTAGES; all 0 where no two known rewards differ."""
    found, known = np.zeros(len(rewards)), ~np.isnan(rewards)
    if is_mixed(rewards):
        found[known] = ADVANTAGES[kind](rewards[known])
    return found


def by_tokens(lengths: Array, longest: int) -> Array:
    """1 ÷ N: every token of the step counts the same. DAPO (arXiv:2503.14476), CISPO (arXiv:2506.13585)."""
    return np.full(len(lengths), 1 / lengths.sum())


def by_answers(lengths: Array, longest: int) -> Array:
    """1 ÷ (M·n): every answer counts the same. GRPO (arXiv:2402.03300), GSPO (arXiv:2507.18071).

    It favours short right answers and long wrong ones.
    """
    return 1 / (len(lengths) * lengths)


def by_constant(lengths: Array, longest: int) -> Array:
    """1 ÷ (M·longest): by the longest answer there may be. Dr. GRPO (arXiv:2503.20783)."""
    return np.full(len(lengths), 1 / (len(lengths) * longest))


NORMALISATIONS: dict[str, Callable[[Array, int], Array]] = {
    "tokens": by_tokens,
    "answers": by_answers,
    "constant": by_constant,
}


def token_factors(lengths: Sequence[int], kind: str, longest: int) -> Array:
    """What to multiply each answer's tokens by (M,), where a trainer divides the sum by N itself.

    `lengths` (M,) are trained tokens, 1 or more each; `longest` is the most that an answer may have.

    >>> token_factors([2, 6], "answers", longest=8).round(4).tolist()  # 8 ÷ (2·2), 8 ÷ (2·6)
    [2.0, 0.6667]
    """
    given = np.asarray(lengths, dtype=np.float64)
    if not len(given):
        return given
    return NORMALISATIONS[kind](given, longest) * given.sum()


def overlong_penalty(length: int, longest: int, margin: int) -> float:
    """DAPO's penalty of long answers (arXiv:2503.14476): 0, falling to −1 over the last `margin` tokens of `longest`.

    >>> overlong_penalty(224, longest=256, margin=64)
    -0.5
    """
    if not margin or length <= longest - margin:
        return 0.0
    return max(-1.0, (longest - margin - length) / margin)
