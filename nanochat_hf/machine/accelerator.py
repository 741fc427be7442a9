"""The Accelerator of a run, and what its processes tell each other."""

import os

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin, is_torch_xla_available, set_seed

from . import cpu
from .compiling import compile_prepared
from .xla import XLAAccelerator

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16", "float8": "bf16"}  # Accelerate's names


# How Accelerate's launcher says which of the launch types that keep an optimizer of their own it was asked for.
REFUSED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


def refuse_other_optimizers():
    """ValueError where the launcher asks for a launch type that brings an optimizer of its own; before Accelerate asks for its package."""
    for variable, kind in REFUSED.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise ValueError(
                f"{kind} keeps its own optimizer and cannot run Muon; launch with DDP (multi_gpu.yaml) or FSDP2 (fsdp2.yaml)"
            )


def process_count():
    """Processes of this run, before an Accelerator is made. ValueError as `refuse_other_optimizers`."""
    refuse_other_optimizers()
    return PartialState(cpu=not on_accelerator()).num_processes


def build_accelerator(
    accumulation, *, dtype=None, trackers=None, output_dir=None, seed=0, compile=False, width=cpu.WIDTH, threads=None
):
    """An Accelerator for `accumulation` micro-batches a step. `dtype`: float32, bfloat16, float16 or float8; None is the launcher's, and
    where that is silent on a CPU or mps the one that is fastest there for a model `width` channels wide; on a CPU `threads` threads, None for
    as many as are fastest now (see machine/cpu.py).

    float8, and mixed_precision fp8 of the launcher, are bfloat16 to Accelerate; who trains asks `chose_float8` and installs the products.
    `compile` lets Accelerate compile the prepared model, for fixed shapes.
    ValueError where `dtype` contradicts the launcher, the CPU lacks it, or the launch type is one that does not carry this optimizer.
    On XLA None is bfloat16, for there the launcher cannot say it (see XLAAccelerator).
    """
    refuse_other_optimizers()
    if dtype not in (None, *PRECISIONS):
        raise ValueError(f"--dtype {dtype} must be float32, bfloat16, float16 or float8")
    launched, float8 = os.environ.get("ACCELERATE_MIXED_PRECISION"), chose_float8(dtype)
    precision = "bf16" if float8 else PRECISIONS.get(dtype)
    # "no" is what Accelerate fills in where nobody chose
    if dtype is not None and launched not in (None, "", "no", precision, *(["fp8"] if float8 else [])):
        raise ValueError(f"--dtype {dtype} disagrees with the launcher's mixed_precision={launched}; drop one of them")
    if float8:
        os.environ.pop(
            "ACCELERATE_FP8_BACKEND", None
        )  # at which Accelerate would convert the layers by another package, in bfloat16 too
    shared = dict(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False),
        log_with=trackers or None,
        project_dir=output_dir,
        step_scheduler_with_optimizer=False,
    )
    if is_torch_xla_available():  # wherever it is importable Accelerate takes it, whatever is asked
        accelerator = XLAAccelerator(dtype=dtype, compile=compile, **shared)
    else:
        host = not on_accelerator()
        if host:
            cpu.set_threads(threads)
        if precision is None and launched in (None, "", "no"):
            precision = machine_precision(host, width)
        accelerator = Accelerator(**shared, mixed_precision=precision, cpu=host)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError(
            "float16 needs a GPU: on the CPU Accelerate would silently train in float32; use --dtype bfloat16 or float32"
        )
    compile_prepared(accelerator, compile)
    set_seed(seed)
    return accelerator


def machine_precision(host, width):
    """Accelerate's name of the precision that this machine is best at; None on GPUs, whose precision the launcher's YAML states."""
    kind = "cpu" if host else torch.accelerator.current_accelerator().type
    if kind not in ("cpu", "mps"):
        return None
    PartialState(cpu=host)  # all processes get one answer
    return PRECISIONS[cpu.best_dtype(torch.device(kind), width)]


def chose_float8(dtype=None):
    """Whether products are to be float8 in training: by --dtype, or where that says nothing by the launcher's mixed_precision fp8."""
    return dtype == "float8" or dtype is None and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8"


def on_accelerator():
    """Whether this run may use a GPU: there is one, and the launcher did not ask for the CPU."""
    return torch.accelerator.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true")


def on_cuda():
    """Whether this run will use a CUDA device."""
    return torch.cuda.is_available() and on_accelerator()


def sum_over_ranks(accelerator):
    """A function that sums a tensor over ranks, on the accelerator's device."""
    return lambda tensor: accelerator.reduce(tensor.to(accelerator.device), reduction="sum")


def agree(accelerator, wanted):
    """True on all ranks where any rank wants it: one small collective, none on one process."""
    if accelerator.num_processes == 1:
        return bool(wanted)
    return bool(any_rank(accelerator, wanted).item())


def any_rank(accelerator, wanted):
    """Above 0, as a 0-d tensor on the device, where any rank wants it: a collective that the host need not wait for."""
    return accelerator.reduce(torch.tensor([float(wanted)], device=accelerator.device), reduction="sum")
