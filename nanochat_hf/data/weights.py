"""How much each message counts: `weight` and `train` of an assistant's messages → a factor for each token."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from nanochat_hf.messages import ConversationError, calculator_code

Segments = list[list[float]]  # for each assistant's turn, the factors of its parts before the 1st, 2nd, … tool answer


def turn_weights(conversation: Mapping[str, Any], where: str = "row") -> Segments | None:
    """The factors of the assistant's turns in a valid conversation; None where all of them are 1.

    A turn within which tools answer has one factor before each answer and one after the last, since several messages
    may become one turn. ConversationError for a weight that is no number of at least 0, and for a train that is
    neither true nor false.

    >>> said = {"role": "assistant", "content": "a", "weight": 0}
    >>> turn_weights({"messages": [{"role": "user", "content": "q"}, said]})
    [[0.0]]
    """
    declared = frozenset(_name(tool) for tool in conversation.get("tools") or ())
    turns: Segments = []
    goes_on = calculating = False
    for message in conversation["messages"]:
        if message["role"] == "assistant":
            own = _segments(message, where)
            turns[-1:] = [turns[-1] + own] if goes_on else [*turns[-1:], own]
            goes_on, calculating = False, _calls_calculator(message, declared)
        elif message["role"] == "tool":
            goes_on, calculating = calculating, False
        else:
            goes_on = calculating = False
    return turns if any(factor != 1 for turn in turns for factor in turn) else None


def _name(tool: Mapping[str, Any]) -> Any:
    return tool.get("function", tool).get("name")


def _calls_calculator(message: Mapping[str, Any], declared: frozenset) -> bool:
    """Whether the message has exactly one call, of the calculator, which is answered within the turn."""
    calls = message.get("tool_calls") or []
    if len(calls) != 1:
        return False
    function = calls[0].get("function") or calls[0]
    call = {"name": function["name"], "arguments": function.get("arguments")}
    return calculator_code(call, declared) is not None


def _segments(message: Mapping[str, Any], where: str) -> list[float]:
    whole = factor_of(message, where)
    if not isinstance(message.get("content"), list):
        return [whole]
    factors: list[float | None] = [None]
    for part in message["content"]:
        if part["type"] == "python_output":
            factors.append(None)
            continue
        own = factor_of(part, where, whole)
        if factors[-1] not in (None, own):
            raise ConversationError(
                f"{where}: parts between two outputs have the weights {factors[-1]} and {own}; give them one weight"
            )
        factors[-1] = own
    known, last = [], whole
    for factor in factors:  # no part between two outputs, or after the last: the factor before holds on
        last = last if factor is None else factor
        known.append(last)
    return known


def factor_of(message: Mapping[str, Any], where: str, default: float = 1.0) -> float:
    """The factor that the `weight` and `train` of a message or part give; `default` where it has neither."""
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
    """The factor of each of the T tokens of a rendered conversation, float32 (T,); 1 outside the assistant's turns."""
    factors = np.ones(len(ids), dtype=np.float32)
    starts, ends = (np.flatnonzero(ids == special[f"<|assistant_{side}|>"]) for side in ("start", "end"))
    for start, segments in zip(starts, turns, strict=True):
        after = ends[ends > start]
        part = slice(start, after[0] + 1 if len(after) else len(ids))  # a conversation may end within a turn
        answers = np.cumsum(ids[part] == special["<|output_end|>"])
        factors[part] = np.asarray(segments, dtype=np.float32)[np.minimum(answers, len(segments) - 1)]
    return factors
