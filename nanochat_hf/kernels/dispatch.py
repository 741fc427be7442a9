"""Choose a kernel for each operation of the model, out of the files in ops/. See README.md."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import nn

from nanochat_hf.model.ops_nanochat_hf import PLAIN, Ops, are_plain

from . import ops as folder

Report = dict[str, tuple[str, str]]  # {operation: (what computes it, why)}
FORMULA = "formula"


def _always(*args: Any) -> bool:
    return True


@dataclass(frozen=True)
class Kernel:
    """The table's entry for a kernel. Calls that the kernel does not serve go to the plain formula."""

    name: str
    run: Callable
    serves: Callable
    formula: Callable
    # names of layers whose weights' gradients the kernel adds to their sums; one tuple for each product, see
    # lib/weights.py
    summed: tuple[tuple[str, ...], ...]

    def __call__(self, *args: Any) -> Any:
        """What the operation returns, see its formula."""
        return self.run(*args) if self.serves(*args) else self.formula(*args)


@cache
def registered() -> tuple[ModuleType, ...]:
    """The modules of ops/, the highest RANK first. Those that need Triton are absent where it is not installed."""
    found = []
    for entry in pkgutil.iter_modules(folder.__path__):
        try:
            found.append(importlib.import_module(f"{folder.__name__}.{entry.name}"))
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "triton":
                raise
    return tuple(sorted(found, key=lambda module: -getattr(module, "RANK", 0)))


def name_of(module: ModuleType) -> str:
    """The name of a kernel, which is that of its file."""
    return module.__name__.rpartition(".")[2]


def kernel_of(module: ModuleType) -> Kernel:
    """The callable that stands in the table for a kernel's module."""
    serves, summed = getattr(module, "serves", _always), getattr(module, "SUMMED", ())
    return Kernel(name_of(module), module.run, serves, getattr(PLAIN, module.OP), summed)


def choose(model: nn.Module, device: torch.device, dtype: torch.dtype) -> tuple[Ops, Report]:
    """The table of operations for training `model` on `device`, and for each operation what computes it and why.

    `model`: a NanochatForCausalLM with its attention implementation set. `dtype`: the dtype of products, so autocast's
    where it is on; float8_e4m3fn asks for float8 where a kernel has it, and bfloat16 for the rest. Set the table as
    `model.model.training_ops`.
    """
    chosen: dict[str, Callable] = {}
    report: Report = {}
    for op in (field.name for field in fields(Ops)):
        reasons = []
        for module in (module for module in registered() if op == module.OP):
            reason = module.fits(model.config, device, dtype)
            if reason is None:
                chosen[op], report[op] = kernel_of(module), (name_of(module), (module.__doc__ or "").partition("\n")[0])
                break
            reasons.append(f"{name_of(module)}: {reason}")
        else:
            report[op] = FORMULA, "; ".join(reasons) or "triton is not installed"
    return replace(PLAIN, **chosen), report


def table(report: Report) -> list[str]:
    """The report of `choose` in aligned lines, for the plan of a run."""
    widths = [max(map(len, column)) for column in zip(*((op, name) for op, (name, _) in report.items()), strict=True)]
    return [f"{op:<{widths[0]}}  {name:<{widths[1]}}  {why}" for op, (name, why) in report.items()]


def summed(model: nn.Module) -> list[list[nn.Module]]:
    """Groups of layers of `model` whose weights' gradients its kernels can sum; one product multiplies a whole group.

    Empty for a model with frozen parts: frozen layers at the bottom get no backward call, so their kernels would never
    run.
    """
    ops = getattr(getattr(model, "model", None), "training_ops", PLAIN)
    if not all(parameter.requires_grad for parameter in model.parameters()):
        return []
    found = []
    for names in dict.fromkeys(names for op in vars(ops).values() for names in getattr(op, "summed", ())):
        for module in model.modules():
            children = dict(module.named_children())
            if not all(name in children for name in names):
                continue
            group = [children[name] for name in names]
            found += [[table] for table in group[0].values()] if isinstance(group[0], nn.ModuleDict) else [group]
    return [group for group in found if are_plain(*group)]
