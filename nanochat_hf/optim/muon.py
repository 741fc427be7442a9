"""Muon on stacks of equal-shaped matrices: momentum, orthogonalisation, variance reduction, cautious weight decay.

Letters: n matrices of r rows and c columns.
"""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nanochat_hf.optim.sharding import Shard, fit_rows, is_dtensor, local, local_piece, start_gather, whole

if TYPE_CHECKING:
    from nanochat_hf.kernels.muon import Tables

# Polar Express (arXiv:2505.16932): the best quintic for each of five steps, for singular values in [1e-3, 1].
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class MuonState(NamedTuple):
    """What Muon remembers of a stack, float32: `buffer` (n, r, c); `second` (n, r, 1) if r >= c, else (n, 1, c)."""

    buffer: torch.Tensor
    second: torch.Tensor


class MuonSettings(NamedTuple):
    """Hyperparameters of one step. The rates are 0-d tensors, so that a schedule never recompiles the update.

    `dtype` is that of the matrix products.
    """

    lr: torch.Tensor
    weight_decay: torch.Tensor
    momentum: torch.Tensor
    beta2: float
    dtype: torch.dtype
    variant: "Variant"


class Variant(NamedTuple):
    """How Muon orthogonalises: by what share the norm is raised before, MuonEq's equal rows, Muon+'s norm after."""

    margin: float = 0.02
    equal_rows: bool = False
    renormed: bool = False

    @classmethod
    def of(cls, group: dict[str, Any]) -> "Variant":
        """That of a parameter group; groups of older checkpoints have the defaults."""
        return cls(group.get("muon_margin", 0.02), group.get("muon_eq", False), group.get("muon_plus", False))

    @property
    def unfused(self) -> str | None:
        """Why the fused kernels do not compute this variant, or None."""
        names = [name for name, on in (("muon_eq", self.equal_rows), ("muon_plus", self.renormed)) if on]
        return f"the fused kernels do not know {' and '.join(names)}" if names else None


def with_equal_rows(matrices: torch.Tensor) -> torch.Tensor:
    """Each row of (n, r, c) scaled to the root mean square of its matrix's row norms (MuonEq)."""
    rows = torch.linalg.vector_norm(matrices, dim=-1, keepdim=True)  # (n, r, 1)
    common = rows.square().mean(dim=-2, keepdim=True).sqrt()
    return matrices * (common / rows.clamp_min(1e-6))


def with_orthogonal_norm(matrices: torch.Tensor) -> torch.Tensor:
    """(n, r, c) scaled to the Frobenius norm √min(r, c), which orthogonal matrices have (Muon+)."""
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    return matrices * (min(matrices.shape[-2:]) ** 0.5 / norm.clamp_min(1e-6))


def orthogonalize(
    matrices: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    norm: torch.Tensor | None = None,
    margin: float = 0.02,
) -> torch.Tensor:
    """Approximate polar factor of each matrix: (n, r, c) → (n, r, c) of `dtype`, with singular values near 1.

    `norm`: the Frobenius norms (n, 1, 1), if they are known. Source: Polar Express, arXiv:2505.16932; the norm is
    raised by `margin`, so that rounding cannot push a singular value above 1.
    """
    if norm is None:
        norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    x = (matrices / ((1 + margin) * norm + 1e-6)).to(dtype)
    tall = x.size(-2) > x.size(-1)
    exact = torch.promote_types(dtype, torch.float32)
    identity = torch.eye(min(x.shape[-2:]), dtype=exact, device=x.device)
    for a, b, c in POLAR_EXPRESS:
        # The polynomial is computed on the Gram matrix of the shorter side, whose products are the cheapest. Only two
        # of the three products of a step touch the whole matrices.
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
        poly = (a * identity + b * gram.to(exact) + c * torch.bmm(gram, gram).to(exact)).to(dtype)
        x = torch.bmm(x, poly) if tall else torch.bmm(poly, x)
    return x


def variance_factor(update: torch.Tensor, second: torch.Tensor, ok: torch.Tensor, *, beta2: float) -> torch.Tensor:
    """Factor for the rows or columns of orthogonalised matrices (n, r, c): float32 (n, r, 1) if r >= c, else (n, 1, c).

    `second`, of that shape, is a moving average of their mean squares; it changes in place where the 0-d bool `ok` is
    true. The factor divides by its root, and then gives each matrix its Frobenius norm back. Both norms are sums of the
    mean squares, so the matrices are read once. Source: NorMuon, arXiv:2510.05491.
    """
    mean = update.float().square().mean(dim=-1 if second.shape[-1] == 1 else -2, keepdim=True)
    second.lerp_(mean, (1 - beta2) * ok.to(torch.float32))
    inverse = second.clamp_min(1e-10).rsqrt()
    before, after = mean.sum((-2, -1), keepdim=True), (mean * inverse.square()).sum((-2, -1), keepdim=True)
    return inverse * (before / after.clamp_min(1e-20)).sqrt()


def factored_update(
    direction: torch.Tensor,
    norm: torch.Tensor,
    second: torch.Tensor,
    ok: torch.Tensor,
    *,
    beta2: float,
    products: tuple[torch.dtype, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions (n, r, c) and their norms (n, 1, 1) → orthogonalised (n, r, c), and `variance_factor`.

    `products`: the dtype of the products, which the result has, and the margin of the norm.
    """
    dtype, margin = products
    update = orthogonalize(direction, dtype, norm, margin)
    return update, variance_factor(update, second, ok, beta2=beta2)


def muon_update(
    param: torch.Tensor, grad: torch.Tensor, state: MuonState, settings: MuonSettings, ok: torch.Tensor
) -> torch.Tensor:
    """One Muon step on a stack: returns the new parameters (n, r, c); `state` changes in place.

    param and grad: (n, r, c). Where the 0-d bool `ok` is false nothing changes: gradients and rates read as zero, so
    the host need not wait for the device to know. Sources: Muon (Jordan et al. 2024), NorMuon (arXiv:2510.05491),
    cautious weight decay (arXiv:2510.12402).
    """
    live = ok.to(torch.float32)
    grad = torch.where(ok, grad.float(), 0.0)
    state.buffer.lerp_(grad, (1 - settings.momentum) * live)
    direction, variant = torch.lerp(grad, state.buffer, settings.momentum * live), settings.variant
    if variant.equal_rows:
        direction = with_equal_rows(direction)
    update = orthogonalize(direction, settings.dtype, margin=variant.margin).float()
    if variant.renormed:
        update = with_orthogonal_norm(update)
    update = update * variance_factor(update, state.second, ok, beta2=settings.beta2)
    value = param.float()
    agrees = (update * value >= 0).float()  # decay only the weights that the update shrinks as well
    change = update + settings.weight_decay * value * agrees
    return (value - settings.lr * live * shape_scale(param) * change).to(param.dtype)


def shape_scale(matrices: torch.Tensor) -> float:
    """Factor of the learning rate for matrices (…, r, c): tall ones take larger steps."""
    return max(1.0, matrices.shape[-2] / matrices.shape[-1]) ** 0.5


@dataclass(frozen=True)
class Compute:
    """How a step computes: `kernel` compiles a function or returns it as it is; `dtype` is that of matrix products.

    `fused`: Triton's kernels may do what they can.
    """

    kernel: Callable[[Callable[..., Any]], Callable[..., Any]]
    dtype: torch.dtype
    fused: bool


class MuonStack:
    """The matrices of one Muon group: this process updates its share and holds their state; then all are gathered.

    State of an owned parameter: momentum_buffer (r, c) and second_momentum (r, 1) or (1, c), views into the stacks.
    """

    def __init__(self, group: dict[str, Any], state: MutableMapping[torch.Tensor, Any], shard: Shard):
        self.group, self.params, self.shard = group, group["params"], shard
        shape = tuple(self.params[0].shape)
        for param in self.params:
            if tuple(param.shape) != shape or len(shape) != 2:
                raise ValueError(
                    f"group {group['name']} mixes {tuple(param.shape)} with {shape}; "
                    "Muon takes one matrix shape a group"
                )
        low, high = shard.span(len(self.params))
        self.owned = self.params[low:high]
        self.tables: Tables | None = None  # of the fused kernels
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

    def step(self, rates: tuple[torch.Tensor, ...], ok: torch.Tensor, compute: Compute) -> Callable[[], None] | None:
        """Update the owned matrices. `rates` are (lr, weight_decay, momentum).

        Returns a callable that waits for the other processes' matrices and writes them, or None if there are none.
        """
        fused = compute.fused and len(self.owned) > 0 and self._fits()
        if self.shard.world == 1:
            if fused:
                self._fused_step(self.owned, ok, compute)
            else:
                values = self._stacked_step(rates, ok, compute)
                moved = [param for param in self.owned if param.grad is not None]
                self._write(moved, [values[param] for param in moved])
            return None
        first = local(self.params[0])
        mine = torch.empty(len(self.owned), *self.params[0].shape, dtype=first.dtype, device=first.device)
        if fused:
            self._fused_step(list(mine), ok, compute)
        else:
            values = self._stacked_step(rates, ok, compute)
            for i, param in enumerate(self.owned):
                mine[i].copy_(values[param])
        wait = start_gather(mine, len(self.params), self.shard)
        return lambda: self._write(self.params, list(wait().unbind(0)))

    def _fits(self) -> bool:
        from nanochat_hf.kernels.muon import fit

        grads = [param.grad for param in self.owned]
        if Variant.of(self.group).unfused:
            return False
        return not any(grad is None or is_dtensor(grad) for grad in grads) and fit(
            [*self.owned, *grads], self.buffer[0].numel()
        )

    def _fused_step(self, out: Sequence[torch.Tensor], ok: torch.Tensor, compute: Compute) -> None:
        from nanochat_hf.kernels import muon as kernels

        tables = self.tables = self.tables or kernels.Tables()
        group = self.group
        grads = tables.get("grads", [param.grad for param in self.owned])
        values, targets = tables.get("params", self.owned), tables.get("out", out)
        direction, norm = kernels.momentum_(grads, self.buffer, float(group["momentum"]), ok, compute.dtype)
        factored, products = compute.kernel(factored_update), (compute.dtype, Variant.of(group).margin)
        update, factor = factored(direction, norm, self.second, ok, beta2=group["betas"][1], products=products)
        rate = float(group["lr"]) * shape_scale(update)
        kernels.apply(values, targets, update.contiguous(), factor.contiguous(), rate, float(group["weight_decay"]), ok)

    def _stacked_step(
        self, rates: tuple[torch.Tensor, ...], ok: torch.Tensor, compute: Compute
    ) -> dict[torch.Tensor, torch.Tensor]:
        # the new value of each owned matrix; the old one if it has no gradient
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
        state = MuonState(*(t if every else t.index_select(0, index) for t in (self.buffer, self.second)))
        settings = MuonSettings(*rates, self.group["betas"][1], compute.dtype, Variant.of(self.group))
        new = compute.kernel(muon_update)(stack, grad, state, settings, ok)
        if not every:
            self.buffer.index_copy_(0, index, state.buffer)
            self.second.index_copy_(0, index, state.second)
        return values | {self.owned[i]: value for i, value in zip(present, new.unbind(0), strict=True)}

    def _write(self, params: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        if params:
            parts = [local_piece(value, param) for value, param in zip(values, params, strict=True)]
            torch._foreach_copy_([local(param.detach()) for param in params], parts)

    def full_state(self) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
        """Every matrix's whole state, {param: {momentum_buffer, second_momentum}}. All processes must call it."""
        buffer = start_gather(self.buffer, len(self.params), self.shard)()
        second = start_gather(self.second, len(self.params), self.shard)()
        return {p: {"momentum_buffer": buffer[i], "second_momentum": second[i]} for i, p in enumerate(self.params)}
