"""Timing for the benchmarks: medians of repeats, on any device."""

import json
import os
import statistics
import time
from pathlib import Path

import torch

from nanochat_hf.machine import cpu
from nanochat_hf.tools.record import table_of, write_record


def wait(device):
    """Until everything launched on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(function, device, *, warmup=3, repeats=7, inner=1):
    """Median milliseconds of `function`, over `repeats` of `inner` calls each."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        for _ in range(inner):
            function()
        wait(device)
        times.append((time.perf_counter() - start) * 1e3 / inner)
    return statistics.median(times)


def peak_memory(device):
    """GiB at the peak since the last reset; None where the device does not count it."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def record(folder, about, rows, names):
    """Write a record of `rows`, whose columns `names` maps to (name, unit); its note is the load of the machine."""
    renamed = [{names.get(key, (key, None))[0]: value for key, value in row.items()} for row in rows]
    units = {name: unit for name, unit in names.values() if unit}
    note = f"{cpu.available_cores()} cores, load {os.getloadavg()[0]:.1f} at the end"
    return write_record(folder, {"figures": table_of(about, renamed, units)}, note=note)


def report(rows, path=None):
    """Print `rows` (dicts of the same keys) as a table, and write them to `path` as JSON."""
    shown = [
        {
            key: f"{v:,.4g}"
            if isinstance(v, float) and abs(v) < 1000
            else f"{v:,.0f}"
            if isinstance(v, float)
            else str(v)
            for key, v in row.items()
        }
        for row in rows
    ]
    widths = {key: max(len(key), *(len(row[key]) for row in shown)) for key in shown[0]}
    print("  ".join(key.ljust(width) for key, width in widths.items()))
    for row in shown:
        print("  ".join(row[key].ljust(width) for key, width in widths.items()), flush=True)
    if path:
        Path(path).write_text(json.dumps(rows, indent=1) + "\n")
