"""An average of the weights over the last part of a run, in float32 beside the model."""

import contextlib
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from nanochat_hf.machine.weights import load_whole_weights, whole_weights

from .base import Callback

if TYPE_CHECKING:
    from nanochat_hf.training.trainer import StepInfo, Trainer


class Average(Callback):
    """Exponential moving average of all parameters, with so much `decay` a step, over the last `share` of the steps.

    It begins with the weights themselves, so it needs no correction. Stands before the callback that saves, whose
    checkpoints keep it.
    """

    name = "ema"

    def __init__(self, decay: float, share: float, num_steps: int) -> None:
        self.decay, self.first = decay, num_steps - int(share * num_steps) + 1
        self.average: list[torch.Tensor] = []  # as the model's parameters, float32; [] before the first

    def __call__(self, trainer: "Trainer", info: "StepInfo") -> None:
        """Take the weights of a step in."""
        if info.step < self.first:
            return
        weights = [parameter.detach().float() for parameter in trainer.raw_model.parameters()]
        if self.average:
            for average, weight in zip(self.average, weights, strict=True):
                average.lerp_(weight, 1 - self.decay)
        else:
            self.average = [weight.clone() for weight in weights]

    @contextlib.contextmanager
    def in_place(self, trainer: "Trainer") -> Generator[None]:
        """The model with the averaged weights while the context lasts. Only one tensor at a time exists twice."""
        self._exchange(trainer)
        try:
            yield
        finally:
            self._exchange(trainer)

    @torch.no_grad()
    def _exchange(self, trainer: "Trainer") -> None:
        for i, parameter in enumerate(trainer.raw_model.parameters()):
            weight = parameter.detach().float().clone()
            parameter.copy_(self.average[i])
            self.average[i] = weight

    def weights(self, trainer: "Trainer") -> dict[str, torch.Tensor]:
        """The average as whole tensors by name, {} before it begins; a collective where the model is split."""
        if not self.average:
            return {}
        with self.in_place(trainer):
            return {name: value.detach().cpu().clone() for name, value in whole_weights(trainer.raw_model).items()}

    def load_weights(self, trainer: "Trainer", weights: Mapping[str, Any]) -> None:
        """Go on from what `weights` returned."""
        parameters = list(trainer.raw_model.parameters())
        own = [parameter.detach().clone() for parameter in parameters]  # each process its part, where they are split
        load_whole_weights(trainer.raw_model, weights)
        self.average = [parameter.detach().float().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter, value in zip(parameters, own, strict=True):
                parameter.copy_(value)
