"""The one training loop. It knows no task, no evaluation and no Hub: those are callbacks."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator

from nanochat_hf import kernels
from nanochat_hf.machine.xla import as_input, mark_step, reduce_gradients
from nanochat_hf.optim import gradient_norms
from nanochat_hf.optim.gradient_sums import gradient_sums

from .stopping import StopSignal

Batch = Mapping[str, torch.Tensor]

# The process groups of wrapped models, until the process ends. When the last reference to a group of gloo goes, torch
# waits for gloo's threads while it holds Python's lock, for which such a thread may wait: one run in fifty ended never.
GROUPS: list[Any] = []


@dataclass
class TrainState:
    """What a checkpoint must hold of the loop. `tokens` counts positions of all ranks, `seconds` training time only.

    `skipped` steps had no target, `overflowed` ones a gradient beyond float16 (the scaler leaves them out and halves
    its scale); `overflowing` of them are the last steps in a row.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    overflowed: int = 0
    overflowing: int = 0


@dataclass(frozen=True)
class StepInfo:
    """One finished step: loss (0-d tensor on the device: this rank's share), valid targets of all ranks, lr multiplier.

    `targets` is a 0-d tensor on several XLA devices, whose host never waits for it. `grad_norms` are those of each
    parameter group before clipping, on the steps that `norms_every` asks for.
    """

    step: int
    loss: torch.Tensor
    targets: int | torch.Tensor
    lr_multiplier: float
    grad_norms: dict[str, torch.Tensor] | None = None


@dataclass(eq=False)
class Trainer:
    """Takes `accumulation` micro-batches a step from `batches`, until `num_steps`.

    The gradient is that of Σ nll·weight ÷ (valid targets of the step over all micro-batches and ranks), however the
    rows are split. schedule(optimizer, step) sets lr, momentum and weight decay before the step. Each callback is
    called with (trainer, info), and `observe` with each micro-batch on the device and what the model said of it.
    """

    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: Any  # a MuonAdamW, and once it is prepared Accelerate's wrapper of it
    batches: Iterable[Batch]
    _: KW_ONLY
    num_steps: int
    schedule: Callable[[torch.optim.Optimizer, int], float]
    callbacks: list[Callable[..., Any]] = field(default_factory=list)
    max_grad_norm: float | None = None
    stop: StopSignal | None = None
    norms_every: int = 0
    observe: Callable[[Batch, Any], object] | None = None

    def __post_init__(self) -> None:
        self.raw_model: Any = self.model  # uncompiled, unwrapped handle on the same weights, for evaluation and saving
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        if (group := getattr(self.model, "process_group", None)) is not None:
            GROUPS.append(group)
        self.accumulation = self.accelerator.gradient_accumulation_steps
        self.callbacks = list(self.callbacks)
        self.state, self.stopped = TrainState(), False
        self.sums = None  # of gradients over the micro-batches of a step, see gradient_sums
        self.restored: dict[str, dict] = {}  # the callbacks' states in the checkpoint that was loaded

    def fit(self) -> TrainState:
        """Train to `num_steps` or until a stop is agreed on; returns the TrainState."""
        batches = iter(self.batches)
        self.model.train()
        with self.gradient_sums() as self.sums:
            while self.state.step < self.num_steps and not self.stopped:
                info = self.step(list(islice(batches, self.accumulation)))
                self.stopped = self.stop is not None and self.stop.agreed()
                for callback in self.callbacks:
                    callback(self, info)
        return self.state

    def gradient_sums(self) -> AbstractContextManager:
        """A context in which kernels add gradients up over micro-batches and find weights in half precision.

        It yields the GradientSums, or None: several processes reduce what autograd hands them, and of one micro-batch a
        step there is nothing to sum.
        """
        alone = self.accelerator.num_processes == 1 and self.accelerator.device.type == "cuda"
        layers = kernels.summed(self.raw_model) if alone and self.accumulation > 1 else []
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        return gradient_sums(layers, half)

    def step(self, micro_batches: Sequence[Batch]) -> StepInfo:
        """One optimizer step over `micro_batches` (dicts of CPU tensors, see collate.py) → StepInfo."""
        start = time.perf_counter()
        if len(micro_batches) < self.accumulation:
            raise ValueError(
                f"the data gave {len(micro_batches)} of {self.accumulation} micro-batches; it is shorter than one step"
            )
        targets = self._valid_targets(micro_batches)
        multiplier = self.schedule(self.optimizer, self.state.step)
        empty = isinstance(targets, int) and targets == 0
        loss, norms = (torch.zeros(()), None) if empty else self._accumulate(micro_batches, targets)
        self.state.skipped += empty
        if self.accelerator.scaler is not None and not empty:
            self.state.overflowing = self.state.overflowing + 1 if self.optimizer.step_was_skipped else 0
            self.state.overflowed += self.state.overflowing > 0
        self.state.step += 1
        self.state.tokens += sum(b["input_ids"].numel() for b in micro_batches) * self.accelerator.num_processes
        self.state.seconds += time.perf_counter() - start  # the host's; whoever waits for the device adds that
        return StepInfo(self.state.step, loss, targets, multiplier, norms)

    def _valid_targets(self, micro_batches):
        # counted on the host, where the batches still are: one process never waits for its device
        local = sum(int((b["shift_labels"] != -100).sum()) for b in micro_batches)
        if self.accelerator.num_processes == 1:
            return local
        count = torch.tensor([local], dtype=torch.float64 if self.accelerator.device.type == "cpu" else torch.float32)
        count = self.accelerator.reduce(count.to(self.accelerator.device), reduction="sum")
        # an XLA device's host runs ahead of it, so the number stays there; without a target the gradients are then zero
        return count[0].clamp(min=1) if self.accelerator.device.type == "xla" else int(count.item())

    def _accumulate(self, micro_batches, targets):
        # forward and backward of all micro-batches, then the update; returns the loss and the gradients' norms
        device, total, norms = self.accelerator.device, 0.0, None
        # backward() divides by the accumulation, DDP by the processes: undo both
        scale = as_input(self.accumulation * self.accelerator.num_processes / targets, device)
        targets = as_input(targets, device)
        if self.sums:
            self.sums.refresh()
        for batch in micro_batches:
            # while positions still lie on the host
            borders = self.raw_model.base_model.document_borders(batch.get("position_ids"), device)
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()} | borders
            with self.accelerator.accumulate(self.model):
                # a sum, divided outside: otherwise each new number of targets would compile the model again
                output = self.model(**batch, num_items_in_batch=1)
                loss = output.loss
                if self.observe is not None:
                    self.observe(batch, output)
                self.accelerator.backward(loss * scale)
                total = total + loss.detach() / targets
                # XLA gets one program for each micro-batch and one for the update, so a change in one compiles only it
                mark_step(device)
                if self.accelerator.sync_gradients:
                    norms = self._update()
        return total, norms

    def _update(self):
        # reached with whole gradients only: on XLA the optimizer's wrapper reduces whenever it is called
        norms = None
        reduce_gradients(self.accelerator, self.optimizer)
        if self.norms_every and (self.state.step + 1) % self.norms_every == 0:
            scaler = self.accelerator.scaler
            scaled = 1.0 if scaler is None else scaler.get_scale()  # until step() unscales
            norms = {name: norm / scaled for name, norm in gradient_norms(self.optimizer).items()}
        if self.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.sums)
        mark_step(self.accelerator.device)
        return norms

    def state_dict(self) -> dict[str, int | float]:
        """The loop's own state, JSON-able."""
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state_dict."""
        self.state = TrainState(**state)
