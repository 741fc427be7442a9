"""Which attention implementation runs, chosen once by device and by what is installed."""

from importlib.util import find_spec
from typing import Protocol

import torch
from transformers import PreTrainedModel
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
    is_kernels_available,
)

from .xla import flash_kernel

KERNELS = ("auto", "eager", "sdpa", "flex_attention", "cudnn", "pallas")
FLASH = {
    "flash_attention_2": (is_flash_attn_2_available, "flash-attn"),
    "flash_attention_3": (is_flash_attn_3_available, "flash-attn-3"),
    "flash_attention_4": (is_flash_attn_4_available, "flash-attn-4"),
}


class FusedAttention(Protocol):
    """An implementation among the kernels, above this layer, that is handed in: kernels.lib.cudnn_attention."""

    def missing(self, device: torch.device) -> tuple[str, str] | None:
        """Why it cannot run on `device`, and the remedy; None where it can."""
        ...

    def register(self) -> str:
        """Make it known to transformers; returns its name there."""
        ...


def is_flash(name: str) -> bool:
    """Whether a name belongs to transformers' flash family: flash_attention_2, 3, 4 or a repository of `kernels`."""
    return name in FLASH or ("/" in name and "flash" in name)


def check_flash(device: torch.device, requested: str, precision: str | None) -> None:
    """ValueError where a member of the flash family cannot run.

    `precision`: Accelerate's mixed precision, None where it is not known.
    """
    there, package = FLASH.get(requested, (lambda: False, None))
    reason = remedy = None
    if device.type != "cuda":
        reason, remedy = "its kernels need a CUDA device", "use sdpa or auto"
    elif precision == "no":
        reason = "it computes in half precision and this run in float32"
        remedy = "add --dtype bfloat16, or use sdpa or auto"
    elif not there() and not is_kernels_available():
        reason = f"neither {package} nor kernels is installed" if package else "kernels is not installed"
        remedy = f"pip install {package or 'kernels'}, or use sdpa or auto"
    if reason:
        raise ValueError(f"--attn {requested} cannot run on {device.type}: {reason}; {remedy}")


def check_cudnn(device: torch.device, precision: str | None, cudnn: FusedAttention | None) -> None:
    """Register cuDNN's attention with transformers; ValueError where it cannot run. `precision`: see check_flash."""
    if cudnn is None:
        raise ValueError("--attn cudnn is for training; use sdpa or auto")
    missing = cudnn.missing(device)
    if missing is None and precision == "no":
        missing = "it computes in half precision and this run in float32", "add --dtype bfloat16, or use sdpa or auto"
    if missing:
        raise ValueError(f"--attn cudnn cannot run on {device.type}: {missing[0]}; {missing[1]}")
    cudnn.register()


def set_attention(model: PreTrainedModel, name: str) -> None:
    """`model.set_attn_implementation(name)`; ValueError that says the remedy where transformers cannot load it."""
    try:
        model.set_attn_implementation(name)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"--attn {name} cannot be loaded: {error}; use sdpa or auto") from error


def choose_attention(
    device: torch.device,
    requested: str = "auto",
    *,
    training: bool = True,
    precision: str | None = None,
    cudnn: FusedAttention | None = None,
) -> tuple[str, str]:
    """The name of an attention implementation and the reason, e.g. ("sdpa", "no CUDA device").

    `requested`: one of KERNELS or of the flash family. "auto" takes, for training: cuDNN's attention on Hopper where
    nvidia-cudnn-frontend is installed and `cudnn` was handed in; else FlexAttention on CUDA, whose block masks skip
    what windows and document borders hide; XLA's flash kernel on a TPU. Elsewhere it takes SDPA.
    `precision`: see check_flash.

    ValueError for an unknown name, for FlexAttention where it has no backward, and for the kernels of TPUs, of cuDNN
    and of the flash family where they cannot run.
    """
    if is_flash(requested):
        check_flash(device, requested, precision)
    elif requested not in KERNELS:
        raise ValueError(f"--attn {requested} is unknown; choose from {', '.join((*KERNELS, *FLASH))}")
    if requested == "cudnn":
        check_cudnn(device, precision, cudnn)
    if requested == "flex_attention" and training and device.type != "cuda":
        raise ValueError(f"--attn flex_attention has no backward on {device.type}; use sdpa or auto")
    if (device.type == "xla" and training) or requested == "pallas":
        kernel, reason = flash_kernel()
        if requested == "pallas" and kernel is None:
            raise ValueError(f"--attn pallas cannot run on {device.type}: {reason}; use sdpa or auto")
        if requested in ("auto", "pallas"):
            return kernel or "sdpa", reason
    if requested != "auto":
        return requested, "asked for"
    if device.type == "cuda" and training:
        return _best_on_cuda(device, precision, cudnn)
    return "sdpa", "generation" if device.type == "cuda" else "no CUDA device"


def _best_on_cuda(device, precision, cudnn):
    if find_spec("triton") is None:
        return "sdpa", "triton is not installed"
    major = torch.cuda.get_device_capability(device)[0]
    # cuDNN has kernels for other GPUs too, but with windows and documents they were measured on Hopper alone
    if major == 9 and precision != "no" and cudnn and cudnn.missing(device) is None:
        reason = "nvidia-cudnn-frontend is installed; its kernels skip what windows and document borders hide"
        return cudnn.register(), reason
    if major < 8:
        return "sdpa", "the GPU is older than Ampere"
    return "flex_attention", "block masks skip windows and document borders"
