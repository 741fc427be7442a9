"""What each step is trained with: the multipliers of learning rate and weight decay, and Muon's momentum.

Every number that a schedule gives to an optimizer is made here, and scripts.plot_schedules draws these same functions.
"""

from dataclasses import dataclass, field

import torch

from nanochat_hf.optim import apply_schedule

MOMENTUM_STEPS = 300  # over which Muon's momentum rises


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves over a run."""

    _argument_group_name = "schedule"

    warmup_steps: int = field(default=0, metadata={"help": "steps of linear warm-up"})
    warmdown_ratio: float = field(default=0.2, metadata={"help": "last share of the run in which lr falls to 0"})

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"--warmup-steps {self.warmup_steps} must be at least 0; 0 is off")
        if not 0 <= self.warmdown_ratio <= 1:
            raise ValueError(f"--warmdown-ratio {self.warmdown_ratio} must lie between 0 and 1; 0.2 is a fifth")


def lr_multiplier(step: int, num_steps: int, warmup_steps: int = 0, warmdown_ratio: float = 0.2) -> float:
    """Multiplier of every learning rate in the step that follows `step` finished ones.

    Linear rise, flat, linear fall to 0.

    It is taken at the middle of the step, so neither the first nor the last step is lost to a rate of 0.

    >>> [lr_multiplier(step, 4, warmup_steps=1, warmdown_ratio=0.5) for step in range(4)]
    [0.5, 1.0, 0.75, 0.25]
    """
    progress = min(step / num_steps + 0.5 / num_steps, 1.0)
    warmup = warmup_steps / num_steps
    if progress < warmup:
        return progress / warmup
    if progress <= 1 - warmdown_ratio:
        return 1.0
    return (1 - progress) / warmdown_ratio


def muon_momentum(step: int, warmup_steps: int = MOMENTUM_STEPS) -> float:
    """Muon's momentum: from 0.85 to 0.95, linearly over the first `warmup_steps` steps.

    >>> round(muon_momentum(150), 3)
    0.9
    """
    share = min(max(step, 0) / warmup_steps, 1.0) if warmup_steps > 0 else 1.0
    return 0.85 + 0.1 * share


def falling(step: int, num_steps: int) -> float:
    """Multiplier of the matrices' weight decay in pretraining: from 1 to 0, linearly.

    >>> falling(1, 4)
    0.75
    """
    return 1 - step / num_steps


@dataclass(frozen=True)
class Schedule:
    """What a run of `num_steps` steps sets before each step. `decay_falls`: pretraining lowers the weight decay to 0.

    ValueError where warm-up and warm-down overlap.
    """

    num_steps: int
    config: ScheduleConfig = ScheduleConfig()
    decay_falls: bool = False

    def __post_init__(self) -> None:
        warmup, warmdown = self.config.warmup_steps, self.config.warmdown_ratio
        if warmup + warmdown * self.num_steps > self.num_steps:
            raise ValueError(
                f"--warmup-steps {warmup} and --warmdown-ratio {warmdown} overlap in a run of {self.num_steps} steps; "
                f"lower --warmup-steps to at most {int(self.num_steps * (1 - warmdown))}"
            )

    def lr(self, step: int) -> float:
        """Multiplier of the learning rates."""
        return lr_multiplier(step, self.num_steps, self.config.warmup_steps, self.config.warmdown_ratio)

    def weight_decay(self, step: int) -> float:
        """Multiplier of the weight decay."""
        return falling(step, self.num_steps) if self.decay_falls else 1.0

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set rates, momentum and weight decay for the step that follows `step` finished ones.

        Returns the rates' multiplier.
        """
        multiplier = self.lr(step)
        plain = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
        apply_schedule(plain, multiplier, muon_momentum(step), self.weight_decay(step))
        return multiplier
