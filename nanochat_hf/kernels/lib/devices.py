"""What a device can do. `fits` asks before a run; the answer is None, or in a few words the reason why not."""

from importlib.util import find_spec

import torch

ALIGNED = 8  # elements: TMA needs rows whose bytes 16 divides
HALF = (torch.bfloat16, torch.float16)
FLOAT8 = torch.float8_e4m3fn  # as a kernel's `dtype`: float8 where a kernel has it, bfloat16 for the rest


def lacks_triton(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on `device`."""
    if device.type != "cuda":
        return f"no Triton on {device.type}"
    if find_spec("triton") is None:
        return "triton is not installed"
    return "the GPU is older than Ampere" if torch.cuda.get_device_capability(device)[0] < 8 else None


def lacks_hopper(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Hopper's products cannot run. Later GPUs have TMA too, but the products were never measured there."""
    if lacks_triton(device):
        return lacks_triton(device)
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "made for Hopper"
    return None if dtype in (*HALF, FLOAT8) else "for half precision"


def hopper_takes(x: torch.Tensor, *widths: int) -> bool:
    """Whether Hopper's products take tensors like `x` with rows of `widths` elements."""
    on_hopper = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9
    return on_hopper and x.dtype in HALF and all(width % ALIGNED == 0 for width in widths)


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors; 2 on the CPU, for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def available(device: torch.device) -> tuple[bool, str]:
    """Whether Triton's kernels can run on `device`, and the reason."""
    reason = lacks_triton(device)
    return reason is None, reason or "CUDA with Triton"
