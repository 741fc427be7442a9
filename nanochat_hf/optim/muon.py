"""Muon on stacks of equal-shaped matrices: momentum, orthogonalisation, variance reduction, cautious weight decay."""

import torch

from nanochat_hf.optim.sharding import Shard, fit_rows, is_dtensor, local, local_piece, start_gather, whole

# Polar Express (arXiv:2505.16932): the best quintic for each of five steps, for singular values in [1e-3, 1].
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Approximate polar factor of each matrix: (n, r, c) → (n, r, c) of `dtype`, singular values near 1.

    Source: Polar Express, arXiv:2505.16932, with 2 % of head-room in the norm against rounding.
    """
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    x = (matrices / (1.02 * norm + 1e-6)).to(dtype)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in POLAR_EXPRESS:
        # the Gram matrix of the shorter side: its products cost the least
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, poly, beta=a) if tall else torch.baddbmm(x, poly, x, beta=a)
    return x


def muon_update(param, grad, buffer, second, lr, weight_decay, momentum, ok, *, beta2, dtype) -> torch.Tensor:
    """One Muon step on a stack: returns the new parameters (n, r, c); `buffer` and `second` change in place.

    param, grad, buffer: (n, r, c); second: (n, r, 1) if r >= c, else (n, 1, c), both states float32. lr, weight_decay
    and momentum are 0-d tensors, so that a schedule never recompiles. Where the 0-d bool `ok` is false nothing changes:
    gradients read as zero and every rate as zero, which needs no host synchronisation.
    Sources: Muon (Jordan et al. 2024), NorMuon (arXiv:2510.05491), cautious weight decay (arXiv:2510.12402).
    """
    rows, columns = param.shape[-2:]
    live = ok.to(torch.float32)
    grad = torch.where(ok, grad.float(), 0.0)
    buffer.lerp_(grad, (1 - momentum) * live)
    update = orthogonalize(torch.lerp(grad, buffer, momentum * live), dtype).float()

    mean = update.square().mean(dim=-1 if rows >= columns else -2, keepdim=True)
    second.lerp_(mean, (1 - beta2) * live)
    scaled = update * second.clamp_min(1e-10).rsqrt()
    norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
    update = scaled * (norm / torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True).clamp_min(1e-10))

    value = param.float()
    agrees = (update * value >= 0).float()  # decay only where the update does not already pull the weight outwards
    rate = lr * live * max(1.0, rows / columns) ** 0.5
    return (value - rate * (update + weight_decay * value * agrees)).to(param.dtype)


class MuonStack:
    """The matrices of one Muon group: this process updates and holds the state of its share, then all are gathered.

    State of an owned parameter: momentum_buffer (r, c) and second_momentum (r, 1) or (1, c), views into the stacks.
    """

    def __init__(self, group: dict, state, shard: Shard):
        self.group, self.params, self.shard = group, group["params"], shard
        shape = tuple(self.params[0].shape)
        for param in self.params:
            if tuple(param.shape) != shape or len(shape) != 2:
                raise ValueError(f"group {group['name']} mixes {tuple(param.shape)} with {shape}; Muon takes one matrix shape a group")
        low, high = shard.span(len(self.params))
        self.owned = self.params[low:high]
        device, (rows, columns) = local(self.params[0]).device, shape
        reduced = (rows, 1) if rows >= columns else (1, columns)
        self.buffer = torch.zeros(high - low, rows, columns, device=device)
        self.second = torch.zeros(high - low, *reduced, device=device)
        saved = {param: state.pop(param, {}) for param in self.params}
        for i, param in enumerate(self.owned):
            views = {"momentum_buffer": self.buffer[i], "second_momentum": self.second[i]}
            for key, view in views.items():
                if key in saved[param]:
                    view.copy_(fit_rows(saved[param][key], view.shape, (0, view.shape[0]), group["name"]))
            state[param] = views

    def step(self, scalars, ok, update, dtype):
        """Update the owned matrices; returns a callable that waits for the others' and writes them."""
        gathers = any(is_dtensor(param) for param in self.params)
        grads = {p: whole(p.grad) for p in (self.params if gathers else self.owned) if p.grad is not None}
        values = {p: whole(p.detach()) for p in (self.params if gathers else self.owned)}
        present = [i for i, param in enumerate(self.owned) if param in grads]
        if present:
            stack = torch.stack([values[self.owned[i]] for i in present])
            grad = torch.stack([grads[self.owned[i]] for i in present])
            every = len(present) == len(self.owned)
            index = torch.tensor(present, device=stack.device)
            buffer, second = (t if every else t.index_select(0, index) for t in (self.buffer, self.second))
            lr, weight_decay, momentum = scalars
            beta2 = self.group["betas"][1]
            new = update(stack, grad, buffer, second, lr, weight_decay, momentum, ok, beta2=beta2, dtype=dtype)
            if not every:
                self.buffer.index_copy_(0, index, buffer)
                self.second.index_copy_(0, index, second)
            for i, value in zip(present, new.unbind(0), strict=True):
                values[self.owned[i]] = value
        if self.shard.world == 1:
            self._write([self.owned[i] for i in present], [values[self.owned[i]] for i in present])
            return None
        first = local(self.params[0])
        mine = torch.empty(len(self.owned), *self.params[0].shape, dtype=first.dtype, device=first.device)
        for i, param in enumerate(self.owned):
            mine[i].copy_(values[param])
        wait = start_gather(mine, len(self.params), self.shard)
        return lambda: self._write(self.params, list(wait().unbind(0)))

    def _write(self, params, values) -> None:
        if params:
            values = [local_piece(value, param) for value, param in zip(values, params, strict=True)]
            torch._foreach_copy_([local(param.detach()) for param in params], values)

    def full_state(self) -> dict:
        """Every matrix's whole state: {param: {momentum_buffer, second_momentum}}; all processes must call it."""
        buffer = start_gather(self.buffer, len(self.params), self.shard)()
        second = start_gather(self.second, len(self.params), self.shard)()
        return {p: {"momentum_buffer": buffer[i], "second_momentum": second[i]} for i, p in enumerate(self.params)}
