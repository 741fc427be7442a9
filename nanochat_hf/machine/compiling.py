"""Whether training is compiled (on CUDA always, on a CPU where it can be and the run is long enough), and how."""

import math
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch
from accelerate.utils import DistributedType, TorchDynamoPlugin

# FLOPs of a process from which it pays on a CPU, where it takes half a minute without a cache and saves two fifths of a step and more
PAYS_FROM = 1e13


def choose_compile(device, wanted, num_steps, step_flops, trial=False):
    """(whether training on `device` is compiled, reason). `wanted`: True, False or None (where it pays); `step_flops`: of one process in
    one step; `trial`: a run that writes nothing.

    choose_compile(torch.device("cpu"), None, 8, 1e10) → (False, "8 steps on a CPU; at this size it pays from 1,000")
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


def lacks():
    """What torch.compile needs on a CPU and this machine has not, in words; "" where it can run."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as torch looks for it
    if not shutil.which(compiler):
        return f"a C++ compiler ({compiler})"
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return "" if headers.is_file() else f"Python's headers ({headers})"


def compile_prepared(accelerator, compile=True, higher_order=False, layers=()):
    """Whether `accelerator` compiles, for fixed shapes, the models that it prepares from now on; False leaves it to the launcher's YAML.

    Under FSDP2 the `layers` are compiled in place: of a model compiled as a whole Accelerate splits the wrapper, so that evaluation, which
    calls the model inside, would not find its parameters together.

    `higher_order`: the model has operators that take functions (FlexAttention, recomputed layers). Of those dynamo cannot cut a graph at
    DDP's buckets, and refuses to; uncut, gradients are reduced once all of them are there.
    """
    # the constructor's own argument counts for the first Accelerator of a process alone, and the scripts make one to count the processes
    whole = compile and not (layers and accelerator.distributed_type == DistributedType.FSDP)
    accelerator.state.dynamo_plugin = (
        TorchDynamoPlugin(backend="inductor", dynamic=False) if whole else TorchDynamoPlugin()
    )
    if compile and not whole:
        compile_layers(layers)
    if compile:
        torch._dynamo.config.optimize_ddp = not higher_order


def compile_layers(layers, backend="inductor"):
    """Compile modules in place, for fixed shapes; one compilation serves all that are alike."""
    for layer in layers:
        layer.compile(backend=backend, dynamic=False)
