"""MuonAdamW: one torch optimizer for the groups of `build_param_groups`."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any

import torch

from nanochat_hf import kernels
from nanochat_hf.machine.cpu import best_dtype
from nanochat_hf.optim.adamw import SHARD_FROM, AdamWTensor, adamw_update
from nanochat_hf.optim.muon import Compute, MuonStack
from nanochat_hf.optim.sharding import Shard, all_agree, local


class MuonAdamW(torch.optim.Optimizer):
    """Muon on groups of kind "muon" (equal-shaped matrices), AdamW on those of kind "adamw".

    `orthogonalize_dtype` is the dtype of Muon's matrix products. None takes that of a loaded state; otherwise bfloat16
    on GPUs and TPUs, and on a CPU or mps the faster one, measured at the first step. `compile`: True and False compile
    the updates or not; None compiles them on CUDA only. `fused`: whether Triton's kernels do Muon's elementwise work;
    None uses them if they can run and `compile` is not False.

    State is float32, whatever the parameters' dtype. A step whose gradients are not all finite changes nothing; that is
    decided on the device, and counted in `skipped_steps`. Parameters without a gradient are left alone.

    With several processes, gradients must be equal on all of them (DDP averages them) or be DTensors. Each process
    computes and remembers its share, and `full_state_dict` joins the shares. Nothing looks at the parameters before the
    first step, because Accelerate may replace them until then.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        orthogonalize_dtype: torch.dtype | None = None,
        compile: bool | None = None,
        fused: bool | None = None,
    ):
        groups = list(groups)
        for group in groups:
            if not isinstance(group, dict) or group.get("kind") not in ("adamw", "muon"):
                raise ValueError(
                    "each group must be a dict with kind 'adamw' or 'muon'; build them with build_param_groups"
                )
        defaults = {"lr": 0.02, "momentum": 0.95, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}
        super().__init__(groups, defaults)
        for group in self.param_groups:
            group.setdefault("name", group["kind"])
            group.setdefault("initial_lr", group["lr"])
            group.setdefault("initial_weight_decay", group["weight_decay"])
        self.orthogonalize_dtype = orthogonalize_dtype
        self.compile, self.fused = compile, fused
        self._units: list[MuonStack | AdamWTensor] | None = None
        self._kernels: dict[Any, Any] = {}
        self._skipped: torch.Tensor | None = None
        self._health: torch.Tensor | None = None  # (steps skipped in a row, number of a parameter with a bad gradient)

    @property
    def skipped_steps(self) -> int:
        """Steps skipped so far because of gradients that were not finite. Reading it waits for the device."""
        return 0 if self._skipped is None else int(self._skipped.item())

    def non_finite(self) -> tuple[int, str | None]:
        """How many of the last steps were skipped in a row, and the name of a parameter whose gradient was not finite.

        Reading waits for the device. The name is None if no step was skipped, and on processes whose own gradients were
        finite.
        """
        if self._health is None:
            return 0, None
        row, culprit = (int(value) for value in self._health.tolist())
        names = [self._name(group, i) for group in self.param_groups for i in range(len(group["params"]))]
        return row, names[culprit] if row and culprit >= 0 else None

    @staticmethod
    def _name(group: dict[str, Any], i: int) -> str:
        names = group.get("param_names")
        return names[i] if names else f"{group['name']}[{i}]"

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        units = self._prepare()
        device = self._device()
        ok = self._gradients_finite(device)
        self._skipped = (self._skipped if self._skipped is not None else torch.zeros((), device=device)).to(device)
        self._skipped.add_(1.0 - ok.to(torch.float32))
        rates = {id(group): self._rates(group, device) for group in self.param_groups}
        fused = self.fused if self.fused is not None else self.compile is not False and kernels.available(device)[0]
        compute = Compute(partial(self._kernel, device=device), self._products(device), fused)
        waits = []
        for unit in units:  # the computation of one unit overlaps the gathering of those before it
            if isinstance(unit, MuonStack):
                waits.append(unit.step(rates[id(unit.group)], ok, compute))
            else:
                # the lambdas are too small to be worth a compiled graph
                update = self._kernel(adamw_update, device) if unit.param.numel() >= SHARD_FROM else adamw_update
                waits.append(unit.step(rates[id(unit.group)], ok, update))
        for wait in waits:
            if wait is not None:
                wait()
        return loss

    def _products(self, device: torch.device) -> torch.dtype:
        # decided once and saved with the state: a resumed run must not depend on a second measurement
        if self.orthogonalize_dtype is None:
            widths = [
                param.shape[-1] for group in self.param_groups if group["kind"] == "muon" for param in group["params"]
            ]
            self.orthogonalize_dtype = getattr(torch, best_dtype(device, min(widths, default=256)))
        return self.orthogonalize_dtype

    def state_dict(self) -> dict[str, Any]:
        """This process's state. Of several processes it is a share, which only the same one of as many can load."""
        if self.state:
            self._prepare()
        shard = Shard.current()
        result = super().state_dict()
        if self._skipped is not None:
            result["skipped_steps"] = self._skipped.clone()
        if self._health is not None:
            result["health"] = self._health.clone()
        if shard.world > 1 and self.state:
            result["shard"] = (shard.rank, shard.world)
        if self.orthogonalize_dtype is not None:
            result["orthogonalize_dtype"] = str(self.orthogonalize_dtype).removeprefix("torch.")
        return result

    def full_state_dict(self, rank0_only: bool = False) -> dict[str, Any] | None:
        """The whole state on the CPU, to be loaded on any number of processes. All processes must call it.

        With `rank0_only` the other processes get None, which saves host memory.
        """
        units = self._prepare()
        keep = not rank0_only or Shard.current().rank == 0
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        index = {param: i for i, param in enumerate(params)}
        state = {}
        for unit in units:
            for param, values in unit.full_state().items():
                if keep:
                    state[index[param]] = {key: value.detach().to("cpu", copy=True) for key, value in values.items()}
        if not keep:
            return None
        result = self.state_dict()
        result.pop("shard", None)
        return {**result, "state": dict(sorted(state.items()))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a whole state (`full_state_dict`), or the share that the same one of as many processes saved.

        States stay float32; torch would cast them to the parameters' dtype. Raises ValueError for another share.
        """
        shard = Shard.current()
        saved = tuple(state_dict.get("shard", (shard.rank, shard.world)))
        if saved != (shard.rank, shard.world):
            raise ValueError(
                f"optimizer state of rank {saved[0]} of {saved[1]} does not fit rank {shard.rank} of {shard.world}; "
                "save full_state_dict() to change the number of processes"
            )
        self._same_architecture(state_dict)
        super().load_state_dict({"param_groups": state_dict["param_groups"], "state": {}})
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for i, param in zip(ids, params, strict=True):
            if i in state_dict["state"]:  # the first step takes this process's share of it
                self.state[param] = {key: value.detach() for key, value in state_dict["state"][i].items()}
        if self.orthogonalize_dtype is None and state_dict.get("orthogonalize_dtype"):
            self.orthogonalize_dtype = getattr(torch, state_dict["orthogonalize_dtype"])
        skipped = state_dict.get("skipped_steps")
        self._skipped = None if skipped is None else skipped.clone()
        health = state_dict.get("health")  # absent in older checkpoints
        self._health = None if health is None else health.clone()
        self._units = None

    def _same_architecture(self, state_dict: dict[str, Any]) -> None:
        saved = {g.get("name", g.get("kind")): g for g in state_dict["param_groups"]}
        own = {g["name"]: g for g in self.param_groups}
        for name in [*own, *saved]:
            if name not in saved or name not in own:
                where = "this model" if name in own else "the saved state"
                raise ValueError(
                    f"optimizer state of another architecture: only {where} has the group {name}; "
                    "load the state of this model"
                )
            counts = len(saved[name]["params"]), len(own[name]["params"])
            if counts[0] != counts[1]:
                raise ValueError(
                    f"optimizer state of another architecture: group {name} has {counts[0]} parameters there and "
                    f"{counts[1]} here; load the state of this model"
                )
        for name, group in own.items():
            for i, (key, param) in enumerate(zip(saved[name]["params"], group["params"], strict=True)):
                values = state_dict["state"].get(key, {})
                average = values.get("exp_avg", values.get("momentum_buffer"))
                if average is None:
                    continue
                there, here = tuple(average.shape), tuple(param.shape)
                # a share may have fewer rows
                if there[1:] != here[1:] or ("shard" not in state_dict and there != here):
                    raise ValueError(
                        f"optimizer state of another architecture: {self._name(group, i)} has shape {there} there and "
                        f"{here} here; load the state of this model"
                    )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_kernels", {})
        self.__dict__.setdefault("fused", None)
        self._units = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the stacks are rebuilt at the next step."""
        super().add_param_group(param_group)
        self._units = None

    def _prepare(self) -> list[MuonStack | AdamWTensor]:
        if self._units is not None:
            return self._units
        shard = Shard.current()
        units: list[MuonStack | AdamWTensor] = []
        for group in self.param_groups:
            if group["kind"] == "muon" and group["params"]:
                units.append(MuonStack(group, self.state, shard))
            elif group["kind"] == "adamw":
                units.extend(AdamWTensor(group, param, self.state, shard) for param in group["params"])
        self._units = units
        return units

    def _device(self) -> torch.device:
        return next(local(param).device for group in self.param_groups for param in group["params"])

    def _gradients_finite(self, device: torch.device) -> torch.Tensor:
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        grads = [(i, local(p.grad)) for i, p in enumerate(params) if p.grad is not None]
        ok = torch.ones((), dtype=torch.bool, device=device)
        culprit = torch.full((), -1.0, device=device)
        if grads:  # a norm is finite only if all elements are; on CUDA all norms take one fused pass
            bad = ~torch.stack([norm.float() for norm in torch._foreach_norm([grad for _, grad in grads])]).isfinite()
            ok = ~bad.any()
            worst = self._places(grads, device).take(bad.float().argmax())  # plain indexing would wait for the device
            culprit = torch.where(ok, culprit, worst)
        ok = all_agree(ok, Shard.current())
        row = torch.zeros((), device=device) if self._health is None else self._health[0].to(device)
        self._health = torch.stack((torch.where(ok, 0.0, row + 1.0), culprit))
        return ok

    def _places(self, grads: list[tuple[int, torch.Tensor]], device: torch.device) -> torch.Tensor:
        # the parameters' numbers, kept on the device: a new copy at each step would make the host wait
        key = tuple(i for i, _ in grads)
        if self._kernels.get("places", (None,))[0] != key:
            self._kernels["places"] = key, torch.tensor([float(i) for i in key]).to(device)
        return self._kernels["places"][1]

    def _kernel(self, function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        if not (device.type == "cuda" if self.compile is None else self.compile):
            return function
        if function not in self._kernels:
            self._kernels[function] = torch.compile(function, dynamic=False, fullgraph=True)
        return self._kernels[function]

    @staticmethod
    def _rates(group: dict[str, Any], device: torch.device) -> tuple[torch.Tensor, ...]:
        values = [float(group[key]) for key in ("lr", "weight_decay", "momentum")]
        if device.type == "xla":
            # elements of a vector: XLA builds the scalars 0 and 1 into its program, and merges equal ones
            return torch.tensor(values).to(device).unbind(0)
        # 0-d CPU tensors may be mixed with CUDA tensors, and need no copy to the device
        home = "cpu" if device.type in ("cpu", "cuda") else device
        return tuple(torch.tensor(value, dtype=torch.float32).to(home) for value in values)
