"""The Accelerator of a run, and what its processes tell each other."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin, is_torch_xla_available, set_seed

from . import cpu
from .compiling import compile_prepared
from .xla import XLAAccelerator

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16", "float8": "bf16"}  # Accelerate's names
# Launch types that bring their own optimizer, by the variable with which Accelerate's launcher announces them.
REFUSED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


@dataclass(frozen=True)
class Ranks:
    """This process's place among all, and how a tensor is summed over them; alone by default."""

    rank: int = 0
    world_size: int = 1
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None

    @classmethod
    def of(cls, accelerator: Accelerator) -> "Ranks":
        """The place of this process in the run of `accelerator`."""
        return cls(accelerator.process_index, accelerator.num_processes, sum_over_ranks(accelerator))


@dataclass(frozen=True)
class Host:
    """How a run uses a CPU: see machine/cpu.py."""

    width: int = cpu.WIDTH  # channels of the model, for which the fastest precision is measured
    threads: int | None = None  # None: as many as are fastest now


@dataclass(frozen=True)
class Tracking:
    """The trackers of a run, by Accelerate's names, and the folder that they write to."""

    trackers: tuple[str, ...] = ()
    folder: str | Path | None = None


def refuse_other_optimizers() -> None:
    """Raise ValueError if the launcher asks for DeepSpeed or Megatron-LM, before Accelerate looks for them."""
    for variable, kind in REFUSED.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise ValueError(
                f"{kind} keeps its own optimizer and cannot run Muon; "
                "launch with DDP (multi_gpu.yaml) or FSDP2 (fsdp2.yaml)"
            )


def process_count() -> int:
    """Number of processes of this run, known before there is an Accelerator. Raises as `refuse_other_optimizers`."""
    refuse_other_optimizers()
    return PartialState(cpu=not on_accelerator()).num_processes


def build_accelerator(
    accumulation: int,
    *,
    dtype: str | None = None,
    compile: bool = False,
    seed: int = 0,
    host: Host | None = None,
    tracking: Tracking | None = None,
) -> Accelerator:
    """Make the Accelerator of a run whose optimizer step takes `accumulation` micro-batches.

    `dtype` is float32, bfloat16, float16 or float8. None leaves it to the launcher; if the launcher says nothing, a CPU
    or mps gets the dtype that is fastest there, and XLA bfloat16. float8, like the launcher's mixed_precision fp8, is
    bfloat16 to Accelerate; the trainer calls `chose_float8` and installs the float8 products. `compile` lets Accelerate
    compile the prepared model, for fixed shapes.
    Raises ValueError if `dtype` contradicts the launcher or the CPU lacks it, and for DeepSpeed and Megatron-LM.
    """
    host, tracking = host or Host(), tracking or Tracking()
    refuse_other_optimizers()
    precision = _precision(dtype)
    accumulated = GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False)
    if is_torch_xla_available():  # wherever torch_xla can be imported Accelerate uses it, whatever else is asked for
        accelerator: Accelerator = XLAAccelerator(
            dtype=dtype,
            compile=compile,
            gradient_accumulation_plugin=accumulated,
            log_with=list(tracking.trackers) or None,  # Accelerate warns of an empty list
            project_dir=tracking.folder,
            step_scheduler_with_optimizer=False,
        )
    else:
        on_host = not on_accelerator()
        if on_host and (precision or os.environ.get("ACCELERATE_MIXED_PRECISION")) == "fp16":
            raise ValueError(
                "float16 needs a GPU: on the CPU Accelerate would silently train in float32; "
                "use --dtype bfloat16 or float32"
            )
        if on_host:
            cpu.set_threads(host.threads)
        if precision is None and os.environ.get("ACCELERATE_MIXED_PRECISION") in (None, "", "no"):
            precision = machine_precision(on_host, host.width)
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=on_host,
            gradient_accumulation_plugin=accumulated,
            log_with=list(tracking.trackers) or None,  # Accelerate warns of an empty list
            project_dir=tracking.folder,
            step_scheduler_with_optimizer=False,
        )
    compile_prepared(accelerator, compile)
    set_seed(seed)
    return accelerator


def _precision(dtype: str | None) -> str | None:
    # Accelerate's name for --dtype; None if the launcher or the machine is to decide.
    if dtype not in (None, *PRECISIONS):
        raise ValueError(f"--dtype {dtype} must be float32, bfloat16, float16 or float8")
    launched, float8 = os.environ.get("ACCELERATE_MIXED_PRECISION"), chose_float8(dtype)
    precision = "bf16" if float8 else None if dtype is None else PRECISIONS[dtype]
    # "no" is what Accelerate fills in if nobody chose
    if dtype is not None and launched not in (None, "", "no", precision, *(["fp8"] if float8 else [])):
        raise ValueError(f"--dtype {dtype} disagrees with the launcher's mixed_precision={launched}; drop one of them")
    if float8:
        # otherwise Accelerate converts the layers with another package, even though it is told bfloat16
        os.environ.pop("ACCELERATE_FP8_BACKEND", None)
    return precision


def machine_precision(host: bool, width: int) -> str | None:
    """The precision that is fastest on this CPU or mps for a model `width` channels wide, by Accelerate's name.

    None on GPUs, where the launcher's YAML states it. `host`: whether the run uses the CPU.
    """
    device = None if host else torch.accelerator.current_accelerator()
    kind = "cpu" if device is None else device.type
    if kind not in ("cpu", "mps"):
        return None
    PartialState(cpu=host)  # so that all processes get the answer of the first
    return PRECISIONS[cpu.best_dtype(torch.device(kind), width)]


def chose_float8(dtype: str | None = None) -> bool:
    """Whether training multiplies in float8: by --dtype, or, if that is None, by the launcher's mixed_precision fp8."""
    return dtype == "float8" or (dtype is None and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8")


def on_accelerator() -> bool:
    """Whether this run may use a GPU: there is one, and the launcher did not ask for the CPU."""
    return torch.accelerator.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true")


def on_cuda() -> bool:
    """Whether this run will use a CUDA device."""
    return torch.cuda.is_available() and on_accelerator()


def sum_over_ranks(accelerator: Accelerator) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that sums a tensor over all processes, on the accelerator's device."""
    return lambda tensor: accelerator.reduce(tensor.to(accelerator.device), reduction="sum")


def agree(accelerator: Accelerator, wanted: bool) -> bool:
    """True on every process if any process wants it. One small collective; none if there is one process."""
    if accelerator.num_processes == 1:
        return bool(wanted)
    return bool(any_rank(accelerator, wanted).item())


def any_rank(accelerator: Accelerator, wanted: bool) -> torch.Tensor:
    """A tensor (1,) above 0 if any process wants it. It stays on the device, so the host need not wait for it."""
    return accelerator.reduce(torch.tensor([float(wanted)], device=accelerator.device), reduction="sum")
