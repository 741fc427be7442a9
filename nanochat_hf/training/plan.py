"""The plan of a run, printed before its first step: sizes, time, memory, machine, and what was chosen and why."""

from accelerate import Accelerator

from nanochat_hf.config import SMALLER
from nanochat_hf.machine import cpu
from nanochat_hf.machine.peaks import device_memory, peak_flops
from nanochat_hf.model import NanochatForCausalLM
from nanochat_hf.scaling import PLANNED_MFU, describe, flops_per_token, memory_per_gpu, shown_hours, training_hours

from .config import TrainConfig
from .equipment import Equipment, step_tokens
from .resuming import measured_before


def lines_of(
    config: TrainConfig, accelerator: Accelerator, model: NanochatForCausalLM, equipment: Equipment, num_steps: int
) -> dict[str, str]:
    """The plan as {name: text}, with the numbers of scripts.plan."""
    rows, positions, processes = config.run.device_batch_size, config.run.max_seq_len, accelerator.num_processes
    tokens = step_tokens(config, accelerator)
    flops, peak = flops_per_token(model, positions) * tokens * num_steps, peak_flops(accelerator.device)
    lines = describe(model, rows, positions, processes, tokens, num_steps)
    if peak:
        hours = training_hours(flops, peak, processes, PLANNED_MFU)
        lines["time"] = f"about {shown_hours(hours)} at {PLANNED_MFU:.0%} MFU"
    # the estimate is calibrated on compiled bfloat16 training without recomputation
    if accelerator.device.type != "cuda" or config.compute.gradient_checkpointing:
        del lines["memory"]
    lines["machine"] = (
        f"{accelerator.device}, {accelerator.distributed_type.value}, mixed precision {accelerator.mixed_precision}, "
        f"attention {model.config._attn_implementation} ({equipment.attention})"
    )
    if accelerator.device.type == "cpu":
        lines |= _cpu_lines(config, accelerator, model.config.hidden_size, flops / processes)
    return lines | equipment.lines


def _cpu_lines(config, accelerator, width, flops):
    # time for so many FLOPs of one process, precision and threads, each with what was measured
    speed = cpu.measure("cpu", width)
    threads = cpu.set_threads(measured_before(config.run.output_dir, config.run.resume)[1])
    chosen = {"no": "float32", "bf16": "bfloat16"}[accelerator.mixed_precision]
    reason = speed.describe() if chosen == speed.best else f"{chosen}, as asked for; measured: {speed.describe()}"
    lines = {
        "time": f"about {shown_hours(cpu.training_seconds(flops, speed) / 3600)}",
        "precision": reason,
        "threads": threads.describe(),
    }
    return lines | ({"warning": cpu.too_slow(speed)} if cpu.too_slow(speed) else {})


def announce(name: str, lines: dict[str, str], accelerator: Accelerator) -> None:
    """Print a plan on the main process."""
    accelerator.print(f"{name}:", *(f"  {title:<11} {text}" for title, text in lines.items()), sep="\n")


def warn_of_memory(config: TrainConfig, accelerator: Accelerator, model: NanochatForCausalLM) -> None:
    """Say where the estimate is more than a GPU has; nothing of cases that the estimate was not made for."""
    if accelerator.device.type != "cuda" or config.compute.gradient_checkpointing:
        return
    if accelerator.distributed_type.value == "FSDP":
        return
    rows, positions = config.run.device_batch_size, config.run.max_seq_len
    there = device_memory(accelerator.device)
    needed = memory_per_gpu(model, rows, positions, accelerator.num_processes)["total"]
    if needed > there:
        accelerator.print(f"warning: about {needed:.0f} GiB are needed and the device has {there:.0f}; {SMALLER}")
