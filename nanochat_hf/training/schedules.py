"""Schedules: step or progress → multiplier. Pure functions; progress runs from 0 to 1 and is clamped to it."""

import math


def _clamp(progress: float) -> float:
    if math.isnan(progress):
        raise ValueError("progress=nan is not a share of the run; pass step / num_steps with num_steps > 0")
    return min(max(progress, 0.0), 1.0)


def base_lr(progress: float, warmup: float = 0.0, warmdown: float = 0.5, final: float = 0.0) -> float:
    """Learning-rate multiplier of pretraining: linear rise, flat, linear fall to `final`.

    `warmup` and `warmdown` are shares of the run. `base_lr(0.25) → 1.0`, `base_lr(0.75) → 0.5`, `base_lr(1.0) → 0.0`.
    Raises ValueError where the shares overlap or are negative.
    """
    if warmup < 0 or warmdown < 0 or warmup + warmdown > 1:
        raise ValueError(f"warmup={warmup} and warmdown={warmdown} must be shares that sum to at most 1; try 0 and 0.5")
    progress = _clamp(progress)
    if progress < warmup:
        return progress / warmup
    if progress <= 1 - warmdown:
        return 1.0
    left = (1 - progress) / warmdown
    return left + (1 - left) * final


def sft_lr(progress: float, flat: float = 0.8) -> float:
    """Learning-rate multiplier of fine-tuning: 1 for the share `flat`, then linearly to 0; `sft_lr(0.9) → 0.5`."""
    if not 0 <= flat <= 1:
        raise ValueError(f"flat={flat} must lie between 0 and 1, a share of the run; try 0.8")
    return base_lr(progress, warmdown=1 - flat)


def muon_momentum(step: int, warmup_steps: int = 300) -> float:
    """Muon's momentum: 0.85 → 0.95 linearly over the first `warmup_steps` steps; `muon_momentum(150) → 0.9`."""
    share = min(max(step, 0) / warmup_steps, 1.0) if warmup_steps > 0 else 1.0
    return 0.85 + 0.1 * share


def weight_decay(progress: float) -> float:
    """Multiplier of Muon's weight decay in pretraining: 1 → 0 linearly; `weight_decay(0.25) → 0.75`."""
    return 1.0 - _clamp(progress)
