"""How much each message counts: `weight` and `train` of an assistant's messages → a factor for each token."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from nanochat_hf.conversation import ConversationError

Segments = list[list[float]]  # of each assistant's turn, the factor of its parts before the 1st, 2nd, … tool answer


def turn_weights(messages: list[dict[str, Any]], where: str = "row") -> Segments | None:
    """The factors of a valid conversation's assistant turns; None where all of them are 1, as without any mark.

    A turn with tool answers has one factor before each of them and one after the last, since its parts may come from
    several messages. ConversationError for a weight that is no number from 0, or a train that is neither true nor false.

    >>> turn_weights([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}])
    [[0.0]]
    """
    turns = [_segments(m, where) for m in messages if m["role"] == "assistant"]
    return turns if any(factor != 1 for turn in turns for factor in turn) else None


def _segments(message: Mapping[str, Any], where: str) -> list[float]:
    whole = factor_of(message, where)
    if isinstance(message["content"], str):
        return [whole]
    factors: list[float | None] = [None]
    for part in message["content"]:
        if part["type"] == "python_output":
            factors.append(None)
        elif factors[-1] is None:
            factors[-1] = factor_of(part, where, whole)
    last = whole
    for i, factor in enumerate(factors):  # nothing but the turn's end comes after a last tool answer
        last = factors[i] = last if factor is None else factor
    return [factor for factor in factors if factor is not None]


def factor_of(message: Mapping[str, Any], where: str, default: float = 1.0) -> float:
    """What a message's or part's `weight` and `train` say together; `default` where they say nothing."""
    train, weight = message.get("train"), message.get("weight")
    if train is not None and train not in (True, False):
        raise ConversationError(f"{where}: a message has train {train!r}; give true or false")
    if train is not None and not train:
        return 0.0
    if weight is None:
        return default
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ConversationError(f"{where}: a message has weight {weight!r}; give a number from 0")
    return float(weight)


def token_factors(ids: np.ndarray, special: Mapping[str, int], turns: Segments) -> np.ndarray:
    """float32 (T,): the factor of each token of a rendered conversation (T ids); 1 outside of the assistant's turns."""
    factors = np.ones(len(ids), dtype=np.float32)
    starts, ends = (np.flatnonzero(ids == special[f"<|assistant_{side}|>"]) for side in ("start", "end"))
    for start, end, segments in zip(starts, ends, turns, strict=True):
        answers = np.cumsum(ids[start : end + 1] == special["<|output_end|>"])
        factors[start : end + 1] = np.asarray(segments, dtype=np.float32)[np.minimum(answers, len(segments) - 1)]
    return factors
