"""Whether training is compiled, and how: always on CUDA, on a CPU where it can be and the run is long enough."""

import math
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, TorchDynamoPlugin

# FLOPs of a process from which compiling pays on a CPU: it takes half a minute and saves two fifths of a step
PAYS_FROM = 1e13


def choose_compile(
    device: torch.device, wanted: bool | None, num_steps: int, step_flops: float, trial: bool = False
) -> tuple[bool, str]:
    """(whether training on `device` is compiled, the reason).

    `wanted`: True, False, or None for where it pays. `step_flops`: FLOPs of one process in one step. `trial`: a run
    that writes nothing.

    >>> choose_compile(torch.device("cpu"), None, 8, 1e10)
    (False, '8 steps on a CPU; at this size it pays from 1,000')
    """
    if wanted is not None:
        return wanted, "asked for"
    if device.type != "cpu":
        return device.type == "cuda", f"the default on {device.type}"
    if trial:
        return False, "a dry run on a CPU"
    if os.environ.get("TORCH_COMPILE_DISABLE", "0") not in ("", "0"):
        return False, "TORCH_COMPILE_DISABLE is set"
    least = math.ceil(PAYS_FROM / step_flops)
    if num_steps < least:
        return False, f"{num_steps:,} steps on a CPU; at this size it pays from {least:,}"
    lacking = lacks()
    return (
        not lacking,
        f"lacks {lacking}; install it to train about twice as fast"
        if lacking
        else f"on a CPU; at this size it pays from {least:,} steps",
    )


def lacks() -> str:
    """What torch.compile needs on a CPU and this machine does not have, in words; "" where it can run."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as torch looks for it
    if not shutil.which(compiler):
        return f"a C++ compiler ({compiler})"
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return "" if headers.is_file() else f"Python's headers ({headers})"


def compile_prepared(
    accelerator: Accelerator, compile: bool = True, higher_order: bool = False, layers: Collection[torch.nn.Module] = ()
) -> None:
    """Let `accelerator` compile, for fixed shapes, the models that it prepares from now on.

    `compile`: False leaves it to the launcher's YAML. `layers`: under FSDP2 these are compiled in place, one by one. If
    the model were compiled as a whole, Accelerate would split the wrapper, and evaluation, which calls the model inside
    it, would not find whole parameters. `higher_order`: the model has operators that take functions (FlexAttention,
    recomputed layers). Dynamo refuses to cut their graph at DDP's buckets, so gradients are reduced once all are there.
    """
    # An argument of the constructor counts only for a process's first Accelerator, and the commands make one before, to
    # count the processes.
    whole = compile and not (layers and accelerator.distributed_type == DistributedType.FSDP)
    accelerator.state.dynamo_plugin = (
        TorchDynamoPlugin(backend=DynamoBackend.INDUCTOR, dynamic=False) if whole else TorchDynamoPlugin()
    )
    if compile and not whole:
        compile_layers(layers)
    if compile:
        torch._dynamo.config.optimize_ddp = not higher_order


def compile_layers(layers: Collection[torch.nn.Module], backend: str | Callable = "inductor") -> None:
    """Compile modules in place, for fixed shapes; one compilation serves all that are alike."""
    for layer in layers:
        layer.compile(backend=backend, dynamic=False)
