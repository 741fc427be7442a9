"""What a run computes with: the Accelerator, and the attention, kernels and compilation that its model is given."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar

from nanochat_hf import kernels
from nanochat_hf.kernels import float8
from nanochat_hf.kernels.lib import cudnn_attention
from nanochat_hf.machine import cpu
from nanochat_hf.machine.accelerator import Host, Tracking, build_accelerator, chose_float8, on_cuda, process_count
from nanochat_hf.machine.attention import choose_attention, set_attention
from nanochat_hf.machine.compiling import choose_compile, compile_prepared
from nanochat_hf.machine.xla import enable_checkpointing
from nanochat_hf.model import NanochatForCausalLM
from nanochat_hf.optim.muon import Variant
from nanochat_hf.scaling import accumulation_steps, flops_per_token

from .config import TrainConfig
from .resuming import measured_before
from .trackers import refuse_missing

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by Accelerate's names
GPU_WORKERS = 4  # data workers that keep a GPU fed; a thread makes 0.35 M tokens/s


def data_workers(wanted: int | None) -> int:
    """Processes that tokenise while training runs.

    As asked, else `GPU_WORKERS` where there is a GPU and a thread elsewhere.
    """
    return wanted if wanted is not None else GPU_WORKERS if on_cuda() else 0


def accelerate(config: TrainConfig, width: int = cpu.WIDTH) -> Accelerator:
    """The Accelerator for `config` and a model `width` channels wide.

    ValueError where the flags ask for what cannot be.

    On a CPU a resumed run keeps the precision and the threads of its checkpoint: a new measurement may say otherwise,
    and then the sums would differ. The bars of transformers are silenced, since the run has its own.
    """
    disable_progress_bar()
    run = config.run
    refuse_missing(config.track.trackers)
    accumulation = accumulation_steps(run.total_batch_size, run.device_batch_size, run.max_seq_len, process_count())
    dtype, threads = measured_before(run.output_dir, run.resume)
    accelerator = build_accelerator(
        accumulation,
        dtype=config.compute.dtype or dtype,
        host=Host(width, threads),
        tracking=Tracking(config.track.trackers, run.output_dir),
        seed=run.seed,
        compile=bool(config.compute.compile),
    )
    if chose_float8(config.compute.dtype):
        able, reason = float8.capable(accelerator.device)
        if not able:
            asked = "--dtype float8" if config.compute.dtype else "mixed_precision=fp8 of the launcher"
            raise ValueError(f"{asked}: {reason}; use bfloat16")
    return accelerator


def step_tokens(config: TrainConfig, accelerator: Accelerator) -> int:
    """Positions of an optimizer step, of all processes."""
    rows = config.run.device_batch_size * accelerator.num_processes * accelerator.gradient_accumulation_steps
    return rows * config.run.max_seq_len


@dataclass(frozen=True)
class Equipment:
    """What a model was given.

    Why this attention, whether it is compiled, and the lines that the plan shows of the rest.
    """

    attention: str
    compiled: bool
    lines: dict[str, str]


def equip(config: TrainConfig, accelerator: Accelerator, model: NanochatForCausalLM, num_steps: int) -> Equipment:
    """Give `model` its attention and kernels, and settle whether it is compiled when the accelerator prepares it."""
    compute = config.compute
    attention, reason = choose_attention(
        accelerator.device, compute.attn, precision=accelerator.mixed_precision, cudnn=cudnn_attention
    )
    set_attention(model, attention)
    fused = install_kernels(config, accelerator, model)
    if compute.gradient_checkpointing:
        enable_checkpointing(model, accelerator.device)
    own_tokens = step_tokens(config, accelerator) // accelerator.num_processes
    compiled, because = choose_compile(
        accelerator.device,
        compute.compile,
        num_steps,
        flops_per_token(model, config.run.max_seq_len) * own_tokens,
        config.run.dry_run,
    )
    higher_order = attention == "flex_attention" or compute.gradient_checkpointing
    compile_prepared(accelerator, compiled, higher_order, list(model.model.layers))
    lines = {"kernels": fused, "compiled": f"{'yes' if compiled else 'no'} ({because})"}
    unfused = Variant(equal_rows=config.optim.muon_eq, renormed=config.optim.muon_plus).unfused
    if unfused:
        lines["Muon"] = f"plain formula ({unfused})"
    return Equipment(reason, compiled, lines)


def install_kernels(config: TrainConfig, accelerator: Accelerator, model: NanochatForCausalLM) -> str:
    """Give `model` the operations that fit flag and device; returns the lines of the plan that say which, and why."""
    wanted, float8_products = config.compute.kernels, chose_float8(config.compute.dtype)
    able, reason = kernels.available(accelerator.device)
    if wanted and not able:
        raise ValueError(f"--kernels true: {reason}; leave it out")
    if float8_products and (wanted is False or not able):
        off = "--kernels false" if able else reason
        raise ValueError(f"float8 is made of kernels, which are off ({off}); turn them on, or use --dtype bfloat16")
    if wanted is False:
        return "plain formulas (asked for)"
    dtype = kernels.FLOAT8 if float8_products else HALF.get(accelerator.mixed_precision, torch.float32)
    model.model.training_ops, report = kernels.choose(model, accelerator.device, dtype)
    return f"\n{'':<14}".join(kernels.table(report)) if able else f"plain formulas ({reason})"
