"""AdamW for embeddings, head and lambdas; large tensors are split by rows among the processes."""

import torch

from nanochat_hf.optim.sharding import Shard, fit_rows, is_dtensor, local, local_piece, start_gather, whole_like

SHARD_FROM = 2**14  # elements; below this a collective costs more than the update


def adamw_update(param, grad, exp_avg, exp_avg_sq, step, lr, weight_decay, ok, *, betas, eps) -> None:
    """One AdamW step in place (arXiv:1711.05101), as torch.optim.AdamW; elementwise, so any shape.

    States and `step` are float32 whatever the dtype of param. lr and weight_decay are 0-d tensors. Where the 0-d bool
    `ok` is false nothing changes.
    """
    beta1, beta2 = betas
    live = ok.to(torch.float32)
    grad = torch.where(ok, grad.float(), 0.0)
    step.add_(live)
    count = step.clamp_min(1.0)  # a skipped first step must not divide by zero
    value = param.float() * (1 - lr * weight_decay * live)
    exp_avg.lerp_(grad, (1 - beta1) * live)
    exp_avg_sq.lerp_(grad.square(), (1 - beta2) * live)
    denominator = (exp_avg_sq / (1 - beta2**count)).sqrt() + eps
    param.copy_(value - (lr * live / (1 - beta1**count)) * (exp_avg / denominator))


class AdamWTensor:
    """One parameter under AdamW: this process updates and holds the state of its rows, then all rows are gathered.

    State: step (0-d), exp_avg and exp_avg_sq, of the shape of the process's rows.
    """

    def __init__(self, group: dict, param, state, shard: Shard):
        self.group, self.param = group, param
        # a DTensor is already split: each process updates its local piece
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

    def _mine(self, tensor):
        return tensor if self.shard.world == 1 else tensor[self.span[0] : self.span[1]]

    def step(self, scalars, ok, update):
        """Update this process's rows; returns a callable that waits for the other rows, or None."""
        whole_param = local(self.param.detach())
        mine = self._mine(whole_param)
        if self.param.grad is not None and mine.numel():
            lr, weight_decay, _ = scalars
            state, group = self.state, self.group
            update(
                mine,
                self._mine(local(self.param.grad)),
                state["exp_avg"],
                state["exp_avg_sq"],
                state["step"],
                lr,
                weight_decay,
                ok,
                betas=tuple(group["betas"]),
                eps=group["eps"],
            )
        elif self.param.grad is not None:
            self.state["step"].add_(ok.to(torch.float32))  # no rows here, but the count stays equal everywhere
        if self.shard.world == 1:
            return None
        wait = start_gather(mine, self.rows, self.shard)
        return lambda: whole_param.copy_(wait())

    def full_state(self) -> dict:
        """The whole tensor's state: {param: {step, exp_avg, exp_avg_sq}}; all processes must call it."""
        full = {"step": self.state["step"]}
        for key in ("exp_avg", "exp_avg_sq"):
            if is_dtensor(self.param):
                full[key] = whole_like(self.state[key], self.param)
            else:
                full[key] = start_gather(self.state[key], self.rows, self.shard)()
        return {self.param: full}
