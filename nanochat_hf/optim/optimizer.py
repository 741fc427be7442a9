"""MuonAdamW: one torch optimizer for the groups of `build_param_groups`."""

from functools import partial
from itertools import chain

import torch

from nanochat_hf import kernels
from nanochat_hf.machine.cpu import best_dtype
from nanochat_hf.optim.adamw import SHARD_FROM, AdamWTensor, adamw_update
from nanochat_hf.optim.muon import MuonStack
from nanochat_hf.optim.sharding import Shard, all_agree, local


class MuonAdamW(torch.optim.Optimizer):
    """Muon on groups of kind "muon" (equal-shaped matrices), AdamW on those of kind "adamw".

    `orthogonalize_dtype`: the dtype of Muon's matrix products; None is the one of a loaded state, else bfloat16 on GPUs and TPUs, and on a
    CPU or mps whichever is faster there, measured at the first step. `compile`: None compiles the updates on CUDA only, True
    and False force it. `fused`: None uses Triton's kernels for Muon's passes over memory where they can run, unless
    `compile` is False. State is float32 whatever the parameters' dtype. A step whose gradients are not all finite
    changes nothing, is decided on the device, and is counted in `skipped_steps`. Parameters without a gradient are
    left alone. Where torch.distributed runs several processes, gradients must be equal on all of them (DDP reduces
    them) or be DTensors; each process then computes and remembers its share only, and `full_state_dict` joins the
    shares. Everything that looks at the parameters waits for the first step, since Accelerate may swap them before.
    """

    def __init__(
        self,
        groups,
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
        self._units = None
        self._kernels = {}
        self._skipped = self._health = None

    @property
    def skipped_steps(self) -> int:
        """Steps skipped for non-finite gradients so far; reading it waits for the device."""
        return 0 if self._skipped is None else int(self._skipped.item())

    def non_finite(self) -> tuple[int, str | None]:
        """(steps skipped in a row until now, name of a parameter whose gradient was not finite at the last of them, or None).

        Reading waits for the device. On several processes the name is known where the gradient was not finite.
        """
        if self._health is None:
            return 0, None
        row, culprit = (int(value) for value in self._health.tolist())
        names = [self._name(group, i) for group in self.param_groups for i in range(len(group["params"]))]
        return row, names[culprit] if row and culprit >= 0 else None

    @staticmethod
    def _name(group, i) -> str:
        names = group.get("param_names")
        return names[i] if names else f"{group['name']}[{i}]"

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._prepare()
        device = self._device()
        ok = self._gradients_finite(device)
        self._skipped = (self._skipped if self._skipped is not None else torch.zeros((), device=device)).to(device)
        self._skipped.add_(1.0 - ok.to(torch.float32))
        scalars = {id(group): self._scalars(group, device) for group in self.param_groups}
        products = self._products(device)
        fused = self.fused if self.fused is not None else self.compile is not False and kernels.available(device)[0]
        waits = []
        for unit in self._units:  # compute of one unit overlaps the gathering of those before it
            if isinstance(unit, MuonStack):
                waits.append(
                    unit.step(scalars[id(unit.group)], ok, partial(self._kernel, device=device), products, fused)
                )
            else:
                # lambdas are too small to be worth a graph of their own
                kernel = self._kernel(adamw_update, device) if unit.param.numel() >= SHARD_FROM else adamw_update
                waits.append(unit.step(scalars[id(unit.group)], ok, kernel))
        for wait in waits:
            if wait is not None:
                wait()
        return loss

    def _products(self, device) -> torch.dtype:
        # settled once, and part of the state: a resumed run must not depend on what a second measurement says
        if self.orthogonalize_dtype is None:
            widths = [
                param.shape[-1] for group in self.param_groups if group["kind"] == "muon" for param in group["params"]
            ]
            self.orthogonalize_dtype = getattr(torch, best_dtype(device, min(widths, default=256)))
        return self.orthogonalize_dtype

    def state_dict(self) -> dict:
        """This process's state; with several processes it is a share that only the same rank of as many can load."""
        if self.state:
            self._prepare()
        shard = Shard.current()
        result = super().state_dict()
        if self._skipped is not None:
            result["skipped_steps"] = self._skipped.clone()
        if shard.world > 1 and self.state:
            result["shard"] = (shard.rank, shard.world)
        if self.orthogonalize_dtype is not None:
            result["orthogonalize_dtype"] = str(self.orthogonalize_dtype).removeprefix("torch.")
        return result

    def full_state_dict(self, rank0_only: bool = False) -> dict:
        """The whole state on the CPU, to be loaded on any number of processes; all processes must call it.

        With `rank0_only` the other ranks get None, to spare host memory.
        """
        self._prepare()
        keep = not rank0_only or Shard.current().rank == 0
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        index = {param: i for i, param in enumerate(params)}
        state = {}
        for unit in self._units:
            for param, values in unit.full_state().items():
                if keep:
                    state[index[param]] = {key: value.detach().to("cpu", copy=True) for key, value in values.items()}
        if not keep:
            return None
        result = self.state_dict()
        result.pop("shard", None)
        return {**result, "state": dict(sorted(state.items()))}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a whole state (`full_state_dict`), or the share that this same rank of as many processes saved.

        States stay float32: torch would cast them to the parameters' dtype. Raises ValueError for another's share.
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
            if i in state_dict["state"]:  # stays where it lies until the first step takes its share of it
                self.state[param] = {key: value.detach() for key, value in state_dict["state"][i].items()}
        if self.orthogonalize_dtype is None and state_dict.get("orthogonalize_dtype"):
            self.orthogonalize_dtype = getattr(torch, state_dict["orthogonalize_dtype"])
        skipped = state_dict.get("skipped_steps")
        self._skipped = None if skipped is None else skipped.clone()
        self._units = None

    def _same_architecture(self, state_dict) -> None:
        saved = {g.get("name", g.get("kind")): g for g in state_dict["param_groups"]}
        own = {g["name"]: g for g in self.param_groups}
        for name in [*own, *saved]:
            if name not in saved or name not in own:
                where = "this model" if name in own else "the saved state"
                raise ValueError(
                    f"optimizer state of another architecture: only {where} has the group {name}; load the state of this model"
                )
            counts = len(saved[name]["params"]), len(own[name]["params"])
            if counts[0] != counts[1]:
                raise ValueError(
                    f"optimizer state of another architecture: group {name} has {counts[0]} parameters there and {counts[1]} here; "
                    "load the state of this model"
                )
        for name, group in own.items():
            for i, (key, param) in enumerate(zip(saved[name]["params"], group["params"], strict=True)):
                values = state_dict["state"].get(key, {})
                shapes = [tuple(v.shape) for k, v in values.items() if k in ("exp_avg", "momentum_buffer")]
                if (
                    shapes
                    and shapes[0][1:] != tuple(param.shape)[1:]
                    or len(shapes)
                    and "shard" not in state_dict
                    and shapes[0] != tuple(param.shape)
                ):
                    raise ValueError(
                        f"optimizer state of another architecture: {self._name(group, i)} has shape {shapes[0]} there and "
                        f"{tuple(param.shape)} here; load the state of this model"
                    )

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__.setdefault("_kernels", {})
        self.__dict__.setdefault("fused", None)
        self._units = None

    def add_param_group(self, param_group) -> None:
        """Add a group; the stacks are rebuilt at the next step."""
        super().add_param_group(param_group)
        self._units = None

    def _prepare(self) -> None:
        if self._units is not None:
            return
        shard = Shard.current()
        self._units = []
        for group in self.param_groups:
            if group["kind"] == "muon" and group["params"]:
                self._units.append(MuonStack(group, self.state, shard))
            elif group["kind"] == "adamw":
                self._units.extend(AdamWTensor(group, param, self.state, shard) for param in group["params"])

    def _device(self):
        return next(local(param).device for group in self.param_groups for param in group["params"])

    def _gradients_finite(self, device) -> torch.Tensor:
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        grads = [(i, local(p.grad)) for i, p in enumerate(params) if p.grad is not None]
        ok = torch.ones((), dtype=torch.bool, device=device)
        culprit = torch.full((), -1.0, device=device)
        if grads:  # a norm is not finite if one element is not; one fused pass over the gradients on CUDA
            bad = ~torch.stack([norm.float() for norm in torch._foreach_norm([grad for _, grad in grads])]).isfinite()
            ok = ~bad.any()
            culprit = torch.where(
                ok, culprit, self._places(grads, device).take(bad.float().argmax())
            )  # indexing would wait for the device
        ok = all_agree(ok, Shard.current())
        row = torch.zeros((), device=device) if self._health is None else self._health[0].to(device)
        self._health = torch.stack((torch.where(ok, 0.0, row + 1.0), culprit))
        return ok

    def _places(self, grads, device) -> torch.Tensor:
        # kept on the device: making it anew at each step would wait for the copy
        key = tuple(i for i, _ in grads)
        if self._kernels.get("places", (None,))[0] != key:
            self._kernels["places"] = key, torch.tensor([float(i) for i in key]).to(device)
        return self._kernels["places"][1]

    def _kernel(self, function, device):
        if not (device.type == "cuda" if self.compile is None else self.compile):
            return function
        if function not in self._kernels:
            self._kernels[function] = torch.compile(function, dynamic=False, fullgraph=True)
        return self._kernels[function]

    @staticmethod
    def _scalars(group, device) -> tuple[torch.Tensor, ...]:
        values = [float(group[key]) for key in ("lr", "weight_decay", "momentum")]
        if (
            device.type == "xla"
        ):  # a vector, since of single numbers it bakes 0 and 1 into the program, and equal ones it merges
            return torch.tensor(values).to(device).unbind(0)
        # 0-d CPU tensors mix with CUDA tensors and need no copy to the device
        home = "cpu" if device.type in ("cpu", "cuda") else device
        return tuple(torch.tensor(value, dtype=torch.float32).to(home) for value in values)
