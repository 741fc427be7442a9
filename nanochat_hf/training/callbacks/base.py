"""What callbacks share. Each is called with (trainer, StepInfo) after every step, and owns its cadence."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nanochat_hf.model import NanochatForCausalLM
    from nanochat_hf.training.trainer import StepInfo, Trainer


def due(step: int, every: int) -> bool:
    """True when `step` is on the cadence `every` (0: never)."""
    return bool(every) and step % every == 0


class Callback(ABC):
    """Something that is done beside the steps. Any callable will do; this adds a state that checkpoints keep.

    `name`: under which they keep it; None: there is none.
    """

    name: str | None = None

    @abstractmethod
    def __call__(self, trainer: "Trainer", info: "StepInfo") -> None:
        """Called after every step."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know to show what the uninterrupted run shows; plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict; ValueError where it holds what this callback does not keep."""
        if state:
            raise ValueError(f"{self.name} keeps no state, and here is one of {', '.join(map(str, state))}")

    def weights(self, trainer: "Trainer") -> dict[str, torch.Tensor]:
        """Whole tensors by name that checkpoints keep too, on the CPU; {} for none. All processes ask."""
        return {}

    def load_weights(self, trainer: "Trainer", weights: Mapping[str, Any]) -> None:
        """Go on from `weights`; ValueError where there are some that this callback does not keep."""
        if weights:
            raise ValueError(f"{self.name} keeps no tensors, and here are {', '.join(map(str, weights))}")


class Measurement(Callback):
    """A callback that measures every `every` steps and at the end.

    Checkpoints are saved before anything is measured, so a run that is resumed from one measures first what was due at
    its step. A run that was asked to stop does not measure: the run that goes on will.
    """

    every: int = 0
    at_start: bool = False  # also before the first step

    def __call__(self, trainer: "Trainer", info: "StepInfo") -> None:
        """Measure where it is due."""
        stopping = trainer.stopped and info.step < trainer.num_steps
        if self.due(trainer, info.step) and not stopping:
            self.measure(trainer)

    def due(self, trainer: "Trainer", step: int) -> bool:
        """Whether to measure after `step`."""
        return due(step, self.every) or step == trainer.num_steps

    @abstractmethod
    def measure(self, trainer: "Trainer") -> None:
        """Measure now, at `trainer.state.step`."""


@contextlib.contextmanager
def evaluating(trainer: "Trainer") -> Generator["NanochatForCausalLM"]:
    """The raw model in evaluation mode, uncompiled, with an attention that takes any shape; afterwards as it was."""
    model, kernel = trainer.raw_model, trainer.raw_model.config._attn_implementation
    model.eval()
    if kernel not in ("eager", "sdpa"):
        model.set_attn_implementation("sdpa")
    try:
        with trainer.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            yield model
    finally:
        model.set_attn_implementation(kernel)
        model.train()
