"""What each step is trained with: the multipliers of learning rate and weight decay, and Muon's momentum.

Every number that a schedule gives to an optimizer is made here, and scripts.plot_schedules draws these same functions.
"""

import math
from dataclasses import dataclass, field

import torch

from nanochat_hf.config import at_least
from nanochat_hf.optim import apply_schedule

MOMENTUM_STEPS = 300  # over which Muon's momentum rises
FIRST_MOMENTUM = 0.85
DECAY_SHAPES = ("constant", "linear", "cosine")
RATES_AT = ("middle", "start")


@dataclass(frozen=True)
class ScheduleConfig:
    """How learning rates, momentum and weight decay move over a run."""

    _argument_group_name = "schedule"

    warmup_steps: int = field(default=0, metadata={"help": "steps of linear warm-up"})
    warmdown_ratio: float = field(default=0.2, metadata={"help": "last share of the run in which lr falls"})
    final_lr_frac: float = field(default=0.0, metadata={"help": "share of the lr to which it falls"})
    rate_at: str = field(
        default="middle", metadata={"help": "where in a step its lr is taken: middle, or start, as nanochat does"}
    )
    scalar_hold_steps: int = field(
        default=0, metadata={"help": "first steps in which the residual scalars stand still"}
    )
    scalar_warmup_steps: int = field(
        default=0, metadata={"help": "steps of linear warm-up of the residual scalars, after those"}
    )
    momentum: float = field(default=0.95, metadata={"help": "Muon's momentum, once it has risen from 0.85"})
    momentum_warmup_steps: int = field(default=MOMENTUM_STEPS, metadata={"help": "steps in which it rises"})
    momentum_final: float | None = field(
        default=None, metadata={"help": "to which it falls while the lr falls (default: it stays)"}
    )
    decay_shape: str = field(
        default="constant", metadata={"help": f"the matrices' weight decay over the run: {', '.join(DECAY_SHAPES)}"}
    )

    def __post_init__(self) -> None:
        at_least(self, 0, "warmup_steps", "scalar_hold_steps", "scalar_warmup_steps", "momentum_warmup_steps")
        if not 0 <= self.warmdown_ratio <= 1:
            raise ValueError(f"--warmdown-ratio {self.warmdown_ratio} must lie between 0 and 1; 0.2 is a fifth")
        if not 0 <= self.final_lr_frac <= 1:
            raise ValueError(f"--final-lr-frac {self.final_lr_frac} must lie between 0 and 1; 0.05 is a twentieth")
        for name, known in (("decay_shape", DECAY_SHAPES), ("rate_at", RATES_AT)):
            if getattr(self, name) not in known:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {getattr(self, name)} is unknown; choose from {', '.join(known)}")
        for name in ("momentum", "momentum_final"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} must lie from 0 to below 1; 0.95 is usual")


def lr_multiplier(
    step: int,
    num_steps: int,
    warmup_steps: int = 0,
    warmdown_ratio: float = 0.2,
    final: float = 0.0,
    at_start: bool = False,
) -> float:
    """Multiplier of every learning rate in the step that follows `step` finished ones.

    Linear rise, flat, linear fall to `final`.

    It is taken at the middle of the step, so neither the first nor the last step is lost to a rate of 0. `at_start`
    takes it where nanochat does: the rise at the end of a step, the fall at its start and over whole steps.

    >>> [lr_multiplier(step, 4, warmup_steps=1, warmdown_ratio=0.5) for step in range(4)]
    [0.5, 1.0, 0.75, 0.25]
    >>> [lr_multiplier(step, 4, warmup_steps=2, warmdown_ratio=0.5, at_start=True) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if at_start:
        falling_steps = round(warmdown_ratio * num_steps)
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        left = (num_steps - step) / falling_steps if step > num_steps - falling_steps else 1.0
    else:
        progress = min(step / num_steps + 0.5 / num_steps, 1.0)
        warmup = warmup_steps / num_steps
        if progress < warmup:
            return progress / warmup
        left = (1 - progress) / warmdown_ratio if progress > 1 - warmdown_ratio else 1.0
    return left + (1 - left) * final


def muon_momentum(step: int, warmup_steps: int = MOMENTUM_STEPS, peak: float = 0.95) -> float:
    """Muon's momentum: from 0.85 to `peak`, linearly over the first `warmup_steps` steps.

    >>> round(muon_momentum(150), 3)
    0.9
    """
    share = min(max(step, 0) / warmup_steps, 1.0) if warmup_steps > 0 else 1.0
    return FIRST_MOMENTUM + (peak - FIRST_MOMENTUM) * share


def falling(step: int, num_steps: int) -> float:
    """Multiplier of the matrices' weight decay in pretraining: from 1 to 0, linearly.

    >>> falling(1, 4)
    0.75
    """
    return 1 - step / num_steps


def decay_multiplier(step: int, num_steps: int, shape: str) -> float:
    """Multiplier of the matrices' weight decay by its shape: 1, or from 1 to 0 on a line or half a cosine.

    >>> [round(decay_multiplier(step, 4, "cosine"), 3) for step in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / num_steps))
    return falling(step, num_steps) if shape == "linear" else 1.0


@dataclass(frozen=True)
class Schedule:
    """What a run of `num_steps` steps sets before each step; ValueError where warm-up and warm-down overlap."""

    num_steps: int
    config: ScheduleConfig = ScheduleConfig()

    def __post_init__(self) -> None:
        warmup, warmdown = self.config.warmup_steps, self.config.warmdown_ratio
        if warmup + warmdown * self.num_steps > self.num_steps:
            raise ValueError(
                f"--warmup-steps {warmup} and --warmdown-ratio {warmdown} overlap in a run of {self.num_steps} steps; "
                f"lower --warmup-steps to at most {int(self.num_steps * (1 - warmdown))}"
            )

    def lr(self, step: int) -> float:
        """Multiplier of the learning rates."""
        config = self.config
        return lr_multiplier(
            step,
            self.num_steps,
            config.warmup_steps,
            config.warmdown_ratio,
            config.final_lr_frac,
            config.rate_at == "start",
        )

    def scalars(self, step: int) -> float:
        """Further multiplier of the residual scalars' rates: 0 while they stand still, then a rise to 1."""
        still, rise = self.config.scalar_hold_steps, self.config.scalar_warmup_steps
        if step < still:
            return 0.0
        return min(1.0, (step + 1 - still) / rise) if rise else 1.0

    def momentum(self, step: int) -> float:
        """Muon's momentum: a rise, flat, and a fall in step with the learning rate's. The rise wins where they meet."""
        config, final = self.config, self.config.momentum_final
        fall = round(config.warmdown_ratio * self.num_steps)
        if final is None or step < config.momentum_warmup_steps or step < self.num_steps - fall:
            return muon_momentum(step, config.momentum_warmup_steps, config.momentum)
        return config.momentum + (final - config.momentum) * (step - (self.num_steps - fall)) / fall

    def weight_decay(self, step: int) -> float:
        """Multiplier of the matrices' weight decay."""
        return decay_multiplier(step, self.num_steps, self.config.decay_shape)

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set rates, momentum and weight decay for the step that follows `step` finished ones.

        Returns the rates' multiplier.
        """
        multiplier = self.lr(step)
        plain = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
        apply_schedule(plain, multiplier, self.momentum(step), self.weight_decay(step), self.scalars(step))
        return multiplier
