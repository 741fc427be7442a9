"""AdamW for embeddings, head and lambdas. Large tensors are divided by rows among the processes."""

from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

import torch

from nanochat_hf.optim.sharding import Shard, fit_rows, is_dtensor, local, local_piece, start_gather, whole_like

SHARD_FROM = 2**14  # elements; for a smaller tensor a collective costs more than the update


class AdamWState(NamedTuple):
    """What AdamW remembers of one tensor, in float32: the number of steps (0-d) and two averages of its shape."""

    step: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


class AdamWSettings(NamedTuple):
    """Hyperparameters of one step. The rates are 0-d tensors, so that a schedule never recompiles the update."""

    lr: torch.Tensor
    weight_decay: torch.Tensor
    betas: tuple[float, float]
    eps: float


def adamw_update(
    param: torch.Tensor, grad: torch.Tensor, state: AdamWState, settings: AdamWSettings, ok: torch.Tensor
) -> None:
    """One AdamW step in place (arXiv:1711.05101), as torch.optim.AdamW; elementwise, so for any shape.

    `param` may have any dtype. Nothing changes where the 0-d bool `ok` is false.
    """
    (beta1, beta2), live = settings.betas, ok.to(torch.float32)
    grad = torch.where(ok, grad.float(), 0.0)
    state.step.add_(live)
    count = state.step.clamp_min(1.0)  # a skipped first step must not divide by zero
    value = param.float() * (1 - settings.lr * settings.weight_decay * live)
    state.exp_avg.lerp_(grad, (1 - beta1) * live)
    state.exp_avg_sq.lerp_(grad.square(), (1 - beta2) * live)
    denominator = (state.exp_avg_sq / (1 - beta2**count)).sqrt() + settings.eps
    param.copy_(value - (settings.lr * live / (1 - beta1**count)) * (state.exp_avg / denominator))


class AdamWTensor:
    """One parameter under AdamW: this process updates its rows and holds their state; then all rows are gathered.

    `state` is the optimizer's: what it holds for `param`, whole or this process's share, is taken over, and replaced by
    {step, exp_avg, exp_avg_sq} of this process's rows.
    """

    def __init__(
        self, group: dict[str, Any], param: torch.Tensor, state: MutableMapping[torch.Tensor, Any], shard: Shard
    ):
        self.group, self.param = group, param
        # FSDP2 has already split a DTensor: each process updates the part that it holds
        split = not is_dtensor(param) and param.ndim > 0 and param.numel() >= SHARD_FROM
        self.shard = shard if split else Shard()
        self.rows = param.shape[0] if split else 1
        self.span = self.shard.span(self.rows)
        mine = self._mine(local(param.detach()))
        saved, name = state.pop(param, {}), group["name"]
        self.state = {"step": torch.zeros((), device=mine.device)}
        if "step" in saved:
            self.state["step"].copy_(saved["step"])
        for key in ("exp_avg", "exp_avg_sq"):
            self.state[key] = torch.zeros(mine.shape, device=mine.device)
            if key in saved:
                value = saved[key]
                if is_dtensor(param) and value.shape == param.shape:
                    value = local_piece(value.to(mine.device), param)
                self.state[key].copy_(fit_rows(value, mine.shape, self.span, name))
        state[param] = self.state

    def _mine(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.shard.world == 1 else tensor[self.span[0] : self.span[1]]

    def step(
        self, rates: tuple[torch.Tensor, ...], ok: torch.Tensor, update: Callable[..., None]
    ) -> Callable[[], Any] | None:
        """Update this process's rows with `update` (`adamw_update`, compiled or not).

        `rates` are (lr, weight_decay, momentum). Returns a callable that waits for the other rows and writes them, or
        None if there is nothing to wait for.
        """
        whole_param, grad = local(self.param.detach()), self.param.grad
        mine = self._mine(whole_param)
        if grad is not None and mine.numel():
            lr, weight_decay, _ = rates
            settings = AdamWSettings(lr, weight_decay, tuple(self.group["betas"]), self.group["eps"])
            update(mine, self._mine(local(grad)), AdamWState(**self.state), settings, ok)
        elif grad is not None:
            self.state["step"].add_(ok.to(torch.float32))  # no rows here, but the count is the same everywhere
        if self.shard.world == 1:
            return None
        wait = start_gather(mine, self.rows, self.shard)
        return lambda: whole_param.copy_(wait())

    def full_state(self) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
        """The whole tensor's state, {param: {step, exp_avg, exp_avg_sq}}. All processes must call it."""
        full = {"step": self.state["step"]}
        for key in ("exp_avg", "exp_avg_sq"):
            if is_dtensor(self.param):
                full[key] = whole_like(self.state[key], self.param)
            else:
                full[key] = start_gather(self.state[key], self.rows, self.shard)()
        return {self.param: full}
