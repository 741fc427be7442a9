"""Which attention kernel runs, chosen once by device and by what is installed."""

from importlib.util import find_spec

import torch

from .runtime import flash_kernel

KERNELS = ("auto", "eager", "sdpa", "flex_attention", "pallas")


def choose_attention(device, requested="auto", *, training=True):
    """The name of an attention implementation and the reason, e.g. ("sdpa", "no CUDA device").

    `device`: torch.device. `requested`: one of KERNELS; "auto" takes FlexAttention for compiled training on CUDA, since its block masks
    skip what windows and document borders hide, XLA's flash kernel for training on a TPU, and SDPA elsewhere. ValueError for an unknown
    name, for FlexAttention where it has no backward, and for the TPU's kernel where it cannot run.
    """
    if requested not in KERNELS:
        raise ValueError(f"--attn {requested} is unknown; choose from {', '.join(KERNELS)}")
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
        return ("flex_attention", "block masks skip windows and document borders") if major >= 8 else ("sdpa", "the GPU is older than Ampere")
    return "sdpa", "generation" if device.type == "cuda" else "no CUDA device"
