"""Which attention kernel runs, chosen once by device and by what is installed."""

from importlib.util import find_spec

import torch
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


def is_flash(name):
    """Whether a name is one of transformers' flash family: flash_attention_2, 3, 4 or a repository of the `kernels` package."""
    return name in FLASH or "/" in name and "flash" in name


def check_flash(device, requested, precision):
    """ValueError where an implementation of the flash family cannot run. `precision`: Accelerate's mixed precision, None where unknown."""
    there, package = FLASH.get(requested, (lambda: False, None))
    reason = remedy = None
    if device.type != "cuda":
        reason, remedy = "its kernels need a CUDA device", "use sdpa or auto"
    elif precision == "no":
        reason, remedy = (
            "it computes in half precision and this run in float32",
            "add --dtype bfloat16, or use sdpa or auto",
        )
    elif not there() and not is_kernels_available():
        reason = f"neither {package} nor kernels is installed" if package else "kernels is not installed"
        remedy = f"pip install {package or 'kernels'}, or use sdpa or auto"
    if reason:
        raise ValueError(f"--attn {requested} cannot run on {device.type}: {reason}; {remedy}")


def check_cudnn(device, precision, cudnn):
    """ValueError where cuDNN's attention cannot run; else it is registered with transformers. `precision`: see check_flash; `cudnn`: see
    choose_attention."""
    missing = cudnn.missing(device) if cudnn else ("its kernel was not handed in", "use sdpa or auto")
    if missing is None and precision == "no":
        missing = "it computes in half precision and this run in float32", "add --dtype bfloat16, or use sdpa or auto"
    if missing:
        raise ValueError(f"--attn cudnn cannot run on {device.type}: {missing[0]}; {missing[1]}")
    cudnn.register()


def set_attention(model, name):
    """`model.set_attn_implementation(name)`; ValueError that says the remedy where transformers cannot load it."""
    try:
        model.set_attn_implementation(name)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"--attn {name} cannot be loaded: {error}; use sdpa or auto") from error


def choose_attention(device, requested="auto", *, training=True, precision=None, cudnn=None):
    """The name of an attention implementation and the reason, e.g. ("sdpa", "no CUDA device").

    `device`: torch.device. `requested`: one of KERNELS or of the flash family; "auto" takes cuDNN's attention for training on Hopper where
    nvidia-cudnn-frontend is installed, else FlexAttention for training on CUDA, since its block masks skip what windows and document borders
    hide, XLA's flash kernel for training on a TPU, and SDPA elsewhere. ValueError for an unknown
    name, for FlexAttention where it has no backward, and for the TPU's, cuDNN's and the flash family's kernels where they cannot run
    (`precision`: see check_flash). `cudnn`: the kernel that "cudnn" names, with `missing(device)` and `register()` as kernels.cudnn_attention
    has them; without it "auto" does not take it.
    """
    if is_flash(requested):
        check_flash(device, requested, precision)
    elif requested not in KERNELS:
        raise ValueError(f"--attn {requested} is unknown; choose from {', '.join((*KERNELS, *FLASH))}")
    if requested == "cudnn":
        check_cudnn(device, precision, cudnn)
    if requested == "flex_attention" and training and device.type != "cuda":
        raise ValueError(f"--attn flex_attention has no backward on {device.type}; use sdpa or auto")
    if device.type == "xla" and training or requested == "pallas":
        kernel, reason = flash_kernel()
        if requested == "pallas" and kernel is None:
            raise ValueError(f"--attn pallas cannot run on {device.type}: {reason}; use sdpa or auto")
        if requested in ("auto", "pallas"):
            return kernel or "sdpa", reason
    if requested != "auto":
        return requested, "asked for"
    if device.type == "cuda" and training:
        if find_spec("triton") is None:
            return "sdpa", "triton is not installed"
        major = torch.cuda.get_device_capability(device)[0]
        # on Hopper alone: its kernels for others exist, but nobody has measured them against FlexAttention with windows and documents
        if major == 9 and precision != "no" and cudnn and cudnn.missing(device) is None:
            return (
                cudnn.register(),
                "nvidia-cudnn-frontend is installed; its kernels skip what windows and document borders hide",
            )
        return (
            ("flex_attention", "block masks skip windows and document borders")
            if major >= 8
            else ("sdpa", "the GPU is older than Ampere")
        )
    return "sdpa", "generation" if device.type == "cuda" else "no CUDA device"
