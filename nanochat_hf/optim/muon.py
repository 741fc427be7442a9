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


def orthogonalize(
    matrices: torch.Tensor, dtype: torch.dtype = torch.bfloat16, norm: torch.Tensor | None = None
) -> torch.Tensor:
    """Approximate polar factor of each matrix: (n, r, c) → (n, r, c) of `dtype`, singular values near 1.

    `norm`: the Frobenius norms (n, 1, 1), where they are known. Source: Polar Express, arXiv:2505.16932, with 2 % of head-room
    in the norm against rounding.
    """
    if norm is None:
        norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    x = (matrices / (1.02 * norm + 1e-6)).to(dtype)
    tall = x.size(-2) > x.size(-1)
    exact = torch.promote_types(dtype, torch.float32)
    identity = torch.eye(min(x.shape[-2:]), dtype=exact, device=x.device)
    for a, b, c in POLAR_EXPRESS:
        # all is done on the Gram matrix of the shorter side: its products cost the least, and the matrices themselves pass through two alone
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
        poly = (a * identity + b * gram.to(exact) + c * torch.bmm(gram, gram).to(exact)).to(dtype)
        x = torch.bmm(x, poly) if tall else torch.bmm(poly, x)
    return x


def variance_factor(update, second, ok, *, beta2) -> torch.Tensor:
    """What the rows or columns of orthogonalised matrices (n, r, c) are multiplied by: (n, r, 1) if r >= c, else (n, 1, c), float32.

    `second`, of that shape, follows their mean squares, in place and where the 0-d bool `ok` is true; the factor divides by its root and
    gives each matrix its Frobenius norm back. Both norms are sums of the mean squares, so the matrices are read once. Source: NorMuon,
    arXiv:2510.05491.
    """
    mean = update.float().square().mean(dim=-1 if second.shape[-1] == 1 else -2, keepdim=True)
    second.lerp_(mean, (1 - beta2) * ok.to(torch.float32))
    inverse = second.clamp_min(1e-10).rsqrt()
    before, after = mean.sum((-2, -1), keepdim=True), (mean * inverse.square()).sum((-2, -1), keepdim=True)
    return inverse * (before / after.clamp_min(1e-20)).sqrt()


def factored_update(direction, norm, second, ok, *, beta2, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions (n, r, c) and their norms (n, 1, 1) → orthogonalised (n, r, c) of `dtype`, and `variance_factor`."""
    update = orthogonalize(direction, dtype, norm)
    return update, variance_factor(update, second, ok, beta2=beta2)


def muon_update(param, grad, buffer, second, lr, weight_decay, momentum, ok, *, beta2, dtype) -> torch.Tensor:
    """One Muon step on a stack: returns the new parameters (n, r, c); `buffer` and `second` change in place.

    param, grad, buffer: (n, r, c); second: (n, r, 1) if r >= c, else (n, 1, c), both states float32. lr, weight_decay
    and momentum are 0-d tensors, so that a schedule never recompiles. Where the 0-d bool `ok` is false nothing changes:
    gradients read as zero and every rate as zero, which needs no host synchronisation.
    Sources: Muon (Jordan et al. 2024), NorMuon (arXiv:2510.05491), cautious weight decay (arXiv:2510.12402).
    """
    live = ok.to(torch.float32)
    grad = torch.where(ok, grad.float(), 0.0)
    buffer.lerp_(grad, (1 - momentum) * live)
    update = orthogonalize(torch.lerp(grad, buffer, momentum * live), dtype)
    update = update.float() * variance_factor(update, second, ok, beta2=beta2)
    value = param.float()
    agrees = (update * value >= 0).float()  # decay only where the update does not already pull the weight outwards
    return (value - lr * live * shape_scale(param) * (update + weight_decay * value * agrees)).to(param.dtype)


def shape_scale(matrices) -> float:
    """The factor of the rate for matrices (…, r, c): tall ones take larger steps."""
    return max(1.0, matrices.shape[-2] / matrices.shape[-1]) ** 0.5


class MuonStack:
    """The matrices of one Muon group: this process updates and holds the state of its share, then all are gathered.

    State of an owned parameter: momentum_buffer (r, c) and second_momentum (r, 1) or (1, c), views into the stacks.
    """

    def __init__(self, group: dict, state, shard: Shard):
        self.group, self.params, self.shard = group, group["params"], shard
        shape = tuple(self.params[0].shape)
        for param in self.params:
            if tuple(param.shape) != shape or len(shape) != 2:
                raise ValueError(
                    f"group {group['name']} mixes {tuple(param.shape)} with {shape}; Muon takes one matrix shape a group"
                )
        low, high = shard.span(len(self.params))
        self.owned = self.params[low:high]
        self.tables = None  # of the fused kernels
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

    def step(self, scalars, ok, kernel, dtype, fused):
        """Update the owned matrices; returns a callable that waits for the others' and writes them.

        `kernel` compiles a function or leaves it; `fused`: whether Triton's kernels may do what they can.
        """
        alone = self.shard.world == 1
        first = local(self.params[0])
        mine = (
            None
            if alone
            else torch.empty(len(self.owned), *self.params[0].shape, dtype=first.dtype, device=first.device)
        )
        if fused and self.owned and self._fits():
            self._fused_step(self.owned if alone else list(mine), ok, kernel, dtype)
        else:
            values = self._stacked_step(scalars, ok, kernel(muon_update), dtype)
            if alone:
                moved = [param for param in self.owned if param.grad is not None]
                self._write(moved, [values[param] for param in moved])
            else:
                for i, param in enumerate(self.owned):
                    mine[i].copy_(values[param])
        if alone:
            return None
        wait = start_gather(mine, len(self.params), self.shard)
        return lambda: self._write(self.params, list(wait().unbind(0)))

    def _fits(self) -> bool:
        from nanochat_hf.kernels.muon import fit

        grads = [param.grad for param in self.owned]
        return not any(grad is None or is_dtensor(grad) for grad in grads) and fit(
            [*self.owned, *grads], self.buffer[0].numel()
        )

    def _fused_step(self, out, ok, kernel, dtype) -> None:
        from nanochat_hf.kernels import muon as kernels

        self.tables = self.tables or kernels.Tables()
        group = self.group
        grads, values, targets = (
            self.tables.get(name, tensors)
            for name, tensors in (("grads", [p.grad for p in self.owned]), ("params", self.owned), ("out", out))
        )
        direction, norm = kernels.momentum_(grads, self.buffer, float(group["momentum"]), ok, dtype)
        update, factor = kernel(factored_update)(direction, norm, self.second, ok, beta2=group["betas"][1], dtype=dtype)
        rate = float(group["lr"]) * shape_scale(update)
        kernels.apply(values, targets, update.contiguous(), factor.contiguous(), rate, float(group["weight_decay"]), ok)

    def _stacked_step(self, scalars, ok, update, dtype) -> dict:
        # every owned matrix's new or, without a gradient, old value
        gathers = any(is_dtensor(param) for param in self.params)
        grads = {p: whole(p.grad) for p in (self.params if gathers else self.owned) if p.grad is not None}
        values = {p: whole(p.detach()) for p in (self.params if gathers else self.owned)}
        present = [i for i, param in enumerate(self.owned) if param in grads]
        if not present:
            return values
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
        return values | {self.owned[i]: value for i, value in zip(present, new.unbind(0), strict=True)}

    def _write(self, params, values) -> None:
        if params:
            values = [local_piece(value, param) for value, param in zip(values, params, strict=True)]
            torch._foreach_copy_([local(param.detach()) for param in params], values)

    def full_state(self) -> dict:
        """Every matrix's whole state: {param: {momentum_buffer, second_momentum}}; all processes must call it."""
        buffer = start_gather(self.buffer, len(self.params), self.shard)()
        second = start_gather(self.second, len(self.params), self.shard)()
        return {p: {"momentum_buffer": buffer[i], "second_momentum": second[i]} for i, p in enumerate(self.params)}
