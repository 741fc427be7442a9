"""A training run: model, optimizer, callbacks and trainer, put together from a TrainConfig."""

import math
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from nanochat_hf import kernels
from nanochat_hf.config import SMALLER, dump, resolved
from nanochat_hf.interop.folder import export
from nanochat_hf.kernels import float8
from nanochat_hf.kernels.lib import cudnn_attention
from nanochat_hf.machine import cpu
from nanochat_hf.machine.accelerator import Host, Tracking, build_accelerator, chose_float8, on_cuda
from nanochat_hf.machine.attention import choose_attention, set_attention
from nanochat_hf.machine.compiling import choose_compile, compile_prepared
from nanochat_hf.machine.peaks import device_memory, peak_flops
from nanochat_hf.machine.weights import whole_weights
from nanochat_hf.machine.xla import enable_checkpointing
from nanochat_hf.optim import MuonAdamW, OptimizerConfig, apply_schedule, build_param_groups
from nanochat_hf.scaling import PLANNED_MFU, describe, flops_per_token, memory_per_gpu, shown_hours, training_hours
from nanochat_hf.tokenizer import token_bytes

from . import checkpoint
from .callbacks.evaluate import Evaluate
from .callbacks.garbage import CollectGarbage
from .callbacks.log import Log
from .callbacks.push import attach
from .callbacks.sample import Sample
from .callbacks.save import Save
from .report import write_report
from .resuming import changed_settings, measured_before, restore
from .schedules import base_lr, muon_momentum
from .stopping import StopSignal
from .tracking import environment, read_metrics
from .trainer import Trainer


def data_workers(wanted):
    """Processes that tokenise while training runs: as asked, or as many as keep a GPU fed where there is one (a thread makes 0.35 M tokens/s)."""
    return wanted if wanted is not None else 4 if on_cuda() else 0


def accelerate(config, accumulation, width=cpu.WIDTH):
    """The Accelerator for `config` and a model `width` channels wide; transformers' own bars are silenced, since the run has its one.

    On a CPU a resumed run keeps the precision and the threads of its checkpoint: what a new measurement says may differ, and so would the sums.
    """
    disable_progress_bar()
    dtype, threads = measured_before(config.output_dir, config.resume)
    accelerator = build_accelerator(
        accumulation,
        dtype=config.dtype or dtype,
        host=Host(width, threads),
        tracking=Tracking(None if config.report_to == "none" else config.report_to, config.output_dir),
        seed=config.seed,
        compile=bool(config.compile),
    )
    if config.report_to != "none" and not accelerator.log_with:  # Accelerate only warns
        raise ValueError(
            f"--report-to {config.report_to}: the package is not installed; pip install 'nanochat_hf[tracking]', "
            "or leave the flag out"
        )
    if chose_float8(config.dtype):
        able, reason = float8.capable(accelerator.device)
        if not able:
            raise ValueError(
                f"{'--dtype float8' if config.dtype else 'mixed_precision=fp8 of the launcher'}: {reason}; use bfloat16"
            )
    return accelerator


HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by Accelerate's names


def install_kernels(config, accelerator, model):
    """Give `model` the operations that fit flag and device; returns the lines of the plan that say which, and why."""
    able, reason = kernels.available(accelerator.device)
    wanted = chose_float8(config.dtype)
    if config.kernels and not able:
        raise ValueError(f"--kernels true: {reason}; leave it out")
    if wanted and (config.kernels is False or not able):
        raise ValueError(
            f"float8 is made of kernels, which are off ({reason if not able else '--kernels false'}); turn them on, or use --dtype bfloat16"
        )
    if config.kernels is False:
        return "plain formulas (asked for)"
    dtype = kernels.FLOAT8 if wanted else HALF.get(accelerator.mixed_precision, torch.float32)
    model.model.training_ops, report = kernels.choose(model, accelerator.device, dtype)
    return f"\n{'':<14}".join(kernels.table(report)) if able else f"plain formulas ({reason})"


def announce(config, accelerator, model, description, num_steps, reason, details):
    """Print the plan of the run, with the numbers of scripts.plan; returns FLOPs per token."""
    rows, positions, processes = config.device_batch_size, config.max_seq_len, accelerator.num_processes
    tokens = rows * positions * processes * accelerator.gradient_accumulation_steps
    flops, peak = flops_per_token(model, positions), peak_flops(accelerator.device)
    lines = describe(model, rows, positions, processes, tokens, num_steps)
    if peak:
        hours = training_hours(flops * tokens * num_steps, peak, processes, PLANNED_MFU)
        lines["time"] = f"about {shown_hours(hours)} at {PLANNED_MFU:.0%} MFU"
    # the estimate is calibrated on compiled bfloat16 training without recomputation
    if accelerator.device.type != "cuda" or config.gradient_checkpointing:
        del lines["memory"]
    lines["machine"] = (
        f"{accelerator.device}, {accelerator.distributed_type.value}, mixed precision {accelerator.mixed_precision}, "
        f"attention {model.config._attn_implementation} ({reason})"
    )
    if accelerator.device.type == "cpu":
        lines |= cpu_lines(config, accelerator, model.config.hidden_size, flops * tokens * num_steps / processes)
    accelerator.print(
        f"{description}:", *(f"  {name:<11} {text}" for name, text in (lines | details).items()), sep="\n"
    )
    if "memory" in lines and accelerator.distributed_type.value != "FSDP":
        there, needed = device_memory(accelerator.device), memory_per_gpu(model, rows, positions, processes)["total"]
        if needed > there:
            accelerator.print(f"warning: about {needed:.0f} GiB are needed and the device has {there:.0f}; {SMALLER}")
    return flops


def cpu_lines(config, accelerator, width, flops):
    """Lines of the plan for a CPU: time for so many FLOPs of one process, precision and threads, each with what was measured."""
    speed, threads = cpu.measure("cpu", width), cpu.set_threads(measured_before(config.output_dir, config.resume)[1])
    chosen = {"no": "float32", "bf16": "bfloat16"}[accelerator.mixed_precision]
    reason = speed.describe() if chosen == speed.best else f"{chosen}, as asked for; measured: {speed.describe()}"
    lines = {
        "time": f"about {shown_hours(cpu.training_seconds(flops, speed) / 3600)}",
        "precision": reason,
        "threads": threads.describe(),
    }
    return lines | ({"warning": cpu.too_slow(speed)} if cpu.too_slow(speed) else {})


def build_trainer(config, accelerator, model, batches, num_steps, lr_scale, decay):
    """Optimizer, schedule and Trainer."""
    optimizer_config = OptimizerConfig(
        embedding_lr=config.embedding_lr,
        unembedding_lr=config.unembedding_lr,
        matrix_lr=config.matrix_lr,
        scalar_lr=config.scalar_lr,
        weight_decay=config.weight_decay,
        batch_lr_scale=lr_scale * config.init_lr_frac,
        matrix_optimizer=config.matrix_optimizer,
    )
    optimizer = MuonAdamW(build_param_groups(model, optimizer_config))

    def schedule(optimizer, step):
        progress, warmup = step / num_steps, config.warmup_steps / num_steps
        multiplier = base_lr(min(progress + 0.5 / num_steps, 1.0), warmup, config.warmdown_ratio, 0.0)
        apply_schedule(
            getattr(optimizer, "optimizer", optimizer), multiplier, muon_momentum(step), 1 - progress if decay else 1.0
        )
        return multiplier

    return Trainer(
        accelerator,
        model,
        optimizer,
        batches,
        num_steps=num_steps,
        schedule=schedule,
        max_grad_norm=config.max_grad_norm,
        stop=StopSignal(accelerator),
        norms_every=config.log_every,
    )


def equip(config, accelerator, model, num_steps):
    """Give `model` its attention and kernels, and settle whether it will be compiled; returns the attention's reason, whether it is compiled, and
    {"kernels": …, "compiled": "yes (asked for)"} for the plan."""
    kernel, reason = choose_attention(
        accelerator.device, config.attn, precision=accelerator.mixed_precision, cudnn=cudnn_attention
    )
    set_attention(model, kernel)
    fused = install_kernels(config, accelerator, model)
    if config.gradient_checkpointing:
        enable_checkpointing(model, accelerator.device)
    share = (
        config.device_batch_size * config.max_seq_len * accelerator.gradient_accumulation_steps
    )  # tokens of a process in a step
    compiled, because = choose_compile(
        accelerator.device,
        config.compile,
        num_steps,
        flops_per_token(model, config.max_seq_len) * share,
        config.dry_run,
    )
    compile_prepared(
        accelerator, compiled, kernel == "flex_attention" or config.gradient_checkpointing, model.model.layers
    )
    return reason, compiled, {"kernels": fused, "compiled": f"{'yes' if compiled else 'no'} ({because})"}


def run(
    config,
    accelerator,
    model,
    tokenizer,
    batches,
    validation,
    num_steps,
    *,
    description,
    settings=None,
    lr_scale=1.0,
    decay=False,
    prompts=(),
    plan=None,
    pusher=None,
    fetch=None,
    callbacks=(),
    figures=dict,
):
    """Train `model` on `batches` for `num_steps`, evaluate on `validation` (batches), save. `plan`: more lines of the printed plan;
    `prompts`: see Sample; `pusher`: see callbacks.push; `fetch`: see restore; `callbacks`: more of them; `figures()`: more of them for the report.

    Returns (final folder, Trainer, Evaluate); the folder is None when the run was stopped, and "" when there is nothing to write.
    """
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}; use the tokenizer it was made with"
        )
    if config.warmup_steps + config.warmdown_ratio * num_steps > num_steps:
        raise ValueError(
            f"--warmup-steps {config.warmup_steps} and --warmdown-ratio {config.warmdown_ratio} overlap in a run of {num_steps} steps; "
            f"lower --warmup-steps to at most {int(num_steps * (1 - config.warmdown_ratio))}"
        )
    reason, compiled, how = equip(config, accelerator, model, num_steps)
    flops = announce(config, accelerator, model, description, num_steps, reason, how | (plan or {}))
    if config.plan_only:
        return "", None, None
    output = None if config.dry_run else config.output_dir
    trainer = build_trainer(config, accelerator, model, batches, num_steps, lr_scale, decay)
    resume = restore(config, trainer, tokenizer, output, fetch)
    settings = (
        resolved(config) | (settings or {}) | {"num_steps": num_steps, "stage": description, "compiled": compiled}
    )
    if resume:
        accelerator.print(*changed_settings(checkpoint.settings_of(resume), settings), sep="", end="")
    settings |= environment(accelerator)
    if accelerator.device.type == "cpu":
        settings["cpu_threads"] = torch.get_num_threads()
    if chose_float8(config.dtype):
        settings["mixed_precision"] += " with float8 products"
    if accelerator.is_main_process and output:
        dump(f"{output}/config.json", settings)
    if config.report_to != "none":
        run_id = checkpoint.trackers_of(resume).get("wandb")
        accelerator.init_trackers(
            config.run_name,
            config=flat(settings),
            init_kwargs={"wandb": {"id": run_id, "resume": "allow"} if run_id else {}},
        )
    evaluate = Evaluate(
        validation,
        token_bytes(tokenizer),
        tokenizer,
        every=config.eval_every,
        output_dir=output,
        best_dir=f"{output}/best" if output and config.keep_best else None,
    )
    log = Log(
        trainer,
        description=description,
        flops_per_token=flops,
        every=config.log_every,
        output_dir=output,
        max_skipped=config.max_skipped,
    )
    if resume and output and Path(output, "metrics.jsonl").is_file() and accelerator.is_main_process:
        evaluate.remember(
            read_metrics(f"{output}/metrics.jsonl")
        )  # behind Log, which forgets what was measured after the checkpoint
    save = Save(output, tokenizer, settings, every=config.save_every, keep=config.keep, minutes=config.save_minutes)
    samples = (
        [Sample(tokenizer, prompts, every=config.sample_every, output_dir=output)]
        if prompts and config.sample_every
        else []
    )
    # saved before anything that could fail: evaluation and samples come after
    trainer.callbacks = [log, *([save] if output else []), evaluate, *samples, *callbacks, CollectGarbage()]
    if config.eval_every and not resume:
        evaluate.run(trainer)
    push = attach(trainer, pusher if output else None, output)
    try:
        trainer.fit()
        folder = finish(config, trainer, evaluate, log, tokenizer, settings, description, output, figures())
    finally:
        trainer.stop.release()
    push.finish(folder, step=trainer.state.step)
    return folder, trainer, evaluate


def divided(batches, rank, world_size):
    """The share of one process in validation batches that all of them have made: the number must not depend on how many there are.

    Each gets as many rows, since evaluation of split models is a collective: where they do not divide, some get a row without a target.
    """
    rows = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    missing = -len(rows["input_ids"]) % world_size
    if missing:
        rows = {key: torch.cat((value, value[:1].expand(missing, -1))) for key, value in rows.items()}
        rows["shift_labels"][-missing:] = -100
    own = {key: value[rank::world_size] for key, value in rows.items()}
    size = len(batches[0]["input_ids"])
    return [
        {key: value[start : start + size] for key, value in own.items()}
        for start in range(0, len(own["input_ids"]), size)
    ]


def finish(config, trainer, evaluate, log, tokenizer, settings, description, output, more):
    """Export, report, say goodbye; returns the final folder, "" for a dry run, None for a stopped one."""
    accelerator, state = trainer.accelerator, trainer.state
    if trainer.stopped and state.step < trainer.num_steps:
        accelerator.print(f"stopped at step {state.step}; continue with --resume auto")
        accelerator.end_training()
        return None
    if math.isnan(evaluate.last):  # the run was already finished when resumed
        evaluate.run(trainer)
    folder = f"{output}/final" if output else ""
    weights = whole_weights(trainer.raw_model)
    figures = {
        "steps": state.step,
        "tokens": state.tokens,
        "seconds of training": state.seconds,
        "minimum validation bpb": evaluate.best,
        "last validation bpb": evaluate.last,
        "validation bpb before": evaluate.first,
        "steps without targets": state.skipped,
        "steps with non-finite gradients": trainer.optimizer.optimizer.skipped_steps + state.overflowed,
        **log.figures,
        **more,
    }
    if accelerator.is_main_process and output:
        export(trainer.raw_model, tokenizer, folder, weights)
        write_report(output, f"{Path(output).name}: {description}", settings, figures)
    where = f"model in {folder}, report in {output}/report.md" if output else "nothing written (dry run)"
    accelerator.print(f"minimum validation bpb {evaluate.best:.4f}; {state.seconds:.0f} s of training; {where}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder


def flat(settings):
    """Settings as trackers take them: scalars as they are, the rest as text."""
    return {
        key: value if isinstance(value, int | float | str | bool) else str(value) for key, value in settings.items()
    }
