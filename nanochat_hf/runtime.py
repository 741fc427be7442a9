"""The machine: Accelerator, device, peak FLOPS, agreement between ranks."""

import os
import signal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, TorchDynamoPlugin, is_torch_xla_available, set_seed

# Dense bf16 peaks in FLOP/s by a part of the device's name (vendors' data sheets); first match wins.
PEAK_FLOPS = (
    ("B200", 2.25e15), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H800", 989e12),
    ("A100", 312e12), ("A800", 312e12), ("L40S", 362e12), ("L4", 121e12), ("4090", 165e12), ("3090", 71e12),
)  # fmt: skip
REFUSED = {DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}


def build_accelerator(accumulation, *, dtype=None, trackers=None, output_dir=None, seed=0, compile=False):
    """An Accelerator for `accumulation` micro-batches a step. `dtype`: None (the launcher's), float32, bfloat16 or float16.

    `compile` lets Accelerate compile the prepared model, for fixed shapes.
    ValueError where `dtype` contradicts the launcher, or the launch type is one that does not carry this optimizer.
    """
    precision = {None: None, "float32": "no", "bfloat16": "bf16", "float16": "fp16"}.get(dtype, dtype)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision is not None and launched not in (None, "", precision):
        raise ValueError(f"--dtype {dtype} disagrees with the launcher's mixed_precision={launched}; drop one of them")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype} must be float32, bfloat16 or float16")
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False),
        mixed_precision=precision, log_with=trackers or None, project_dir=output_dir, step_scheduler_with_optimizer=False,
        dynamo_plugin=TorchDynamoPlugin(backend="inductor", dynamic=False) if compile else None,
        cpu=not is_torch_xla_available() and not on_accelerator(),  # where torch_xla is importable Accelerate takes it, whatever is asked
    )  # fmt: skip
    if accelerator.distributed_type in REFUSED:
        raise ValueError(f"{accelerator.distributed_type} keeps its own optimizer and cannot run Muon; use DDP or FSDP2")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("float16 needs a GPU: on the CPU Accelerate would silently train in float32; use --dtype bfloat16 or float32")
    set_seed(seed)
    return accelerator


def on_accelerator():
    """Whether this run may use a GPU: there is one, and the launcher did not ask for the CPU."""
    return torch.accelerator.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true")


def on_cuda():
    """Whether this run will use a CUDA device."""
    return torch.cuda.is_available() and on_accelerator()


def peak_flops(device):
    """Dense bf16 FLOP/s of the device, or None where unknown (then no MFU is printed)."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name):
    """Dense bf16 FLOP/s by a device's name, however it is written; None where unknown. peak_of("h100") → 989e12."""
    return next((peak for part, peak in PEAK_FLOPS if part.lower() in name.lower()), None)


def sum_over_ranks(accelerator):
    """A function that sums a tensor over ranks, on the accelerator's device."""
    return lambda tensor: accelerator.reduce(tensor.to(accelerator.device), reduction="sum")


class StopSignal:
    """SIGTERM and SIGINT ask for a stop after the running step; so does the launcher's death. Ranks agree through `agreed`."""

    def __init__(self, accelerator):
        self.accelerator, self.received, self.parent = accelerator, 0, os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        self.received = number

    def agreed(self):
        """True on all ranks once any rank was asked to stop (one small collective when there are several)."""
        return agree(self.accelerator, bool(self.received) or os.getppid() != self.parent)


def agree(accelerator, wanted):
    """True on all ranks where any rank wants it: one small collective, none on one process."""
    if accelerator.num_processes == 1:
        return bool(wanted)
    flag = torch.tensor([float(wanted)], device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum").item())


def whole_weights(model):
    """The state dict of `model` with whole tensors, on every rank that will write; a collective under FSDP2."""
    if not any(hasattr(p, "full_tensor") for p in model.parameters()):
        weights = model.state_dict()
        # safetensors reads storages, which XLA tensors do not have
        return {name: value.cpu() for name, value in weights.items()} if model.device.type == "xla" else weights
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_whole_weights(model, weights):
    """Fill `model`, split by FSDP2 or not, from whole tensors that every rank has read."""
    if not any(hasattr(p, "full_tensor") for p in model.parameters()):
        model.load_state_dict(weights)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
