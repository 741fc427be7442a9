"""Whether training is compiled: on CUDA always, on a CPU where it can be and the run is long enough."""

import math
import os
import shutil
import sys
import sysconfig
from pathlib import Path

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
    return not lacking, f"lacks {lacking}; install it to train about twice as fast" if lacking else f"on a CPU; at this size it pays from {least:,} steps"


def lacks():
    """What torch.compile needs on a CPU and this machine has not, in words; "" where it can run."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as torch looks for it
    if not shutil.which(compiler):
        return f"a C++ compiler ({compiler})"
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return "" if headers.is_file() else f"Python's headers ({headers})"
