"""What happens during training beside the steps. Each callback owns its cadence and is called with (trainer, StepInfo)."""

import contextlib
import math
import time
from dataclasses import replace
from pathlib import Path

import torch

from . import checkpoint
from .evals.bpb import evaluate_bpb
from .generation import Engine
from .runtime import agree, for_generation, peak_flops, step_by_step, sum_over_ranks, whole_weights
from .tracking import Ema, MetricsFile, Progress, say, wandb_run_id

EVAL_TOKENS = 8192  # positions whose float32 logits an evaluation holds at a time: 1 GiB at 32,768 tokens of vocabulary
SETTLING_STEPS, ESTIMATE_AT = 3, 10  # the steps that compile, and the one after which the rest of the run is foretold


def due(step, every):
    """True when `step` is on the cadence `every` (0: never)."""
    return bool(every) and step % every == 0


@contextlib.contextmanager
def evaluating(trainer):
    """The raw model in evaluation mode, uncompiled, with an attention that takes any shape; afterwards as it was."""
    model, kernel = trainer.raw_model, trainer.raw_model.config._attn_implementation
    model.eval()
    if kernel not in ("eager", "sdpa"):
        model.set_attn_implementation("sdpa")
    try:
        with trainer.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            yield model
    finally:
        model.set_attn_implementation(kernel)
        model.train()


def pieces(batches, tokens=EVAL_TOKENS):
    """The same rows in batches of at most `tokens` positions (one row at least)."""
    for batch in batches:
        rows = max(1, tokens // batch["input_ids"].shape[1])
        for start in range(0, len(batch["input_ids"]), rows):
            yield {key: value[start : start + rows] for key, value in batch.items()}


class Log:
    """Every step the bar; every `every` steps the trackers and metrics.jsonl. Ends the run when gradients stay non-finite."""

    def __init__(self, trainer, *, description, flops_per_token, every=10, output_dir=None, max_skipped=20):
        self.every, self.flops, self.ema, self.max_skipped = every, flops_per_token, Ema(0.9), max_skipped
        self.peak = peak_flops(trainer.accelerator.device)
        self.main = trainer.accelerator.is_main_process
        self.metrics = MetricsFile(f"{output_dir}/metrics.jsonl" if output_dir and self.main else None)
        self.metrics.truncate(trainer.state.step)
        self.progress = Progress(trainer.accelerator, trainer.num_steps, trainer.state.step, description)
        self.clock, self.figures = time.perf_counter(), {}
        self.before = replace(trainer.state)  # as of the last entry
        self.first, self.settled, self.estimated = trainer.state.step, None, False

    def __call__(self, trainer, info):
        done = info.step - self.first
        if done == SETTLING_STEPS:
            self.settled = time.perf_counter(), info.step
        if self.settled and not self.estimated and done >= ESTIMATE_AT:
            each = (time.perf_counter() - self.settled[0]) / (info.step - self.settled[1])
            left = each * (trainer.num_steps - info.step)
            say(trainer.accelerator, f"{each:.3g} s a step, about {left / 60:.1f} min to go")
            self.estimated = True
        if info.step % self.every and info.step != trainer.num_steps:
            self.progress.update(info.step, **self.figures)
            return
        values = self._values(trainer, info)
        trainer.accelerator.log(values, step=info.step)
        self.metrics.write(step=info.step, **values)
        self.progress.update(info.step, fresh=True, **self.figures)
        if info.step == trainer.num_steps:
            self.progress.close()
        self._check(trainer, info, values["train/loss"] if values["train/targets"] else 0.0)

    def _values(self, trainer, info):
        accelerator, state = trainer.accelerator, trainer.state
        start = time.perf_counter()
        loss = sum_over_ranks(accelerator)(info.loss.float()).item()
        now = time.perf_counter()
        state.seconds += now - start  # by which the device was behind the host
        targets = int(info.targets)
        if not targets:  # no loss either
            loss = self.ema.average
        elif math.isfinite(loss):  # what is not would stay in the average for good
            loss = self.ema.update(loss)
        rate = (state.tokens - self.before.tokens) / (now - self.clock)
        each = (state.seconds - self.before.seconds) / (state.step - self.before.step)
        self.clock, self.before = now, replace(state)
        values = {
            "train/loss": loss, "train/lr_multiplier": info.lr_multiplier, "train/tokens_per_second": rate,
            "train/step_seconds": each, "train/tokens": state.tokens, "train/targets": targets,
            "train/skipped_steps": state.skipped, "train/total_flops": self.flops * state.tokens, "train/seconds": state.seconds,
            "train/epoch": trainer.batches.epoch,
        }  # fmt: skip
        if accelerator.scaler is not None:
            values |= {"train/loss_scale": accelerator.scaler.get_scale(), "train/overflowed_steps": state.overflowed}
        values |= {f"grad_norm/{name}": norm.item() for name, norm in (info.grad_norms or {}).items()}
        values |= {f"lr/{group['name']}": group["lr"] for group in trainer.optimizer.param_groups}
        self.figures = {"loss": f"{loss:.3f}", "lr": f"{info.lr_multiplier:.2f}", "tok/s": f"{rate:,.0f}"}
        if self.peak:
            values["train/mfu"] = self.flops * rate / (self.peak * accelerator.num_processes)
            self.figures["mfu"] = f"{values['train/mfu']:.1%}"
        if accelerator.device.type == "cuda":
            values["train/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            self.figures["mem"] = f"{values['train/peak_memory_gib']:.1f} GiB"
        return values

    def _check(self, trainer, info, loss):
        row, name = trainer.optimizer.optimizer.non_finite()
        if trainer.overflows:
            row, name = trainer.overflows, f"float16, at a loss scale of {trainer.accelerator.scaler.get_scale():.3g}"
        if row and row >= self.max_skipped:
            raise ValueError(
                f"step {info.step}: gradients were not finite in {row} steps in a row, in {name or 'another rank'} at the last; "
                "lower --matrix-lr and --embedding-lr, or use --dtype bfloat16 or float32; the last checkpoint is whole"
            )
        if row or not math.isfinite(loss):
            say(
                trainer.accelerator,
                f"warning: step {info.step}: loss {loss:.4g}, {row} steps in a row skipped for non-finite gradients ({name or 'elsewhere'})"
            )


class Evaluate:
    """Bits per byte on fixed validation batches, every `every` steps and at the end; keeps the minimum, and its model in `best_dir`."""

    def __init__(self, batches, token_bytes, tokenizer, *, every, output_dir=None, best_dir=None):
        self.batches, self.token_bytes, self.tokenizer, self.every, self.output_dir = batches, token_bytes, tokenizer, every, output_dir
        self.best, self.last, self.first, self.best_dir = float("inf"), float("nan"), None, best_dir

    def remember(self, entries):
        """Take over what a resumed run measured before: its entries of metrics.jsonl, as read_metrics gives them. The main process's count."""
        values = [entry["val/bpb"] for entry in entries if "val/bpb" in entry]
        if values:
            self.first, self.best = values[0], min(values)

    def run(self, trainer):
        """Evaluate now; returns bpb, equal on all ranks."""
        with evaluating(trainer) as model:
            batches = step_by_step(model.device, pieces(self.batches))
            self.last = evaluate_bpb(model, batches, self.token_bytes, reduce=sum_over_ranks(trainer.accelerator))
        self.first = self.last if self.first is None else self.first
        accelerator, step = trainer.accelerator, trainer.state.step
        if self.last > 1.02 * self.best:
            say(accelerator, f"warning: step {step}: validation rose to {self.last:.4f} bpb from {self.best:.4f}; the run may be diverging")
        better, self.best = self.last < self.best, min(self.best, self.last)
        accelerator.log({"val/bpb": self.last}, step=step)
        if accelerator.is_main_process:
            MetricsFile(f"{self.output_dir}/metrics.jsonl" if self.output_dir else None).write(step=step, **{"val/bpb": self.last})
        say(accelerator, f"step {step}: validation {self.last:.4f} bpb")
        # only the main process knows what was measured before a resume, and gathering split weights needs all of them
        if self.best_dir and agree(accelerator, better and accelerator.is_main_process) and step:
            weights = whole_weights(trainer.raw_model)
            if accelerator.is_main_process:
                checkpoint.export(trainer.raw_model, self.tokenizer, self.best_dir, weights)
        return self.last

    def __call__(self, trainer, info):
        if due(info.step, self.every) or info.step == trainer.num_steps:
            self.run(trainer)


class Sample:
    """Greedy answers to fixed prompts, every `every` steps and at the end, printed and kept in samples.md."""

    def __init__(self, tokenizer, prompts, *, every, output_dir=None, max_new_tokens=16):
        """`prompts`: list of (text shown, ids)."""
        self.tokenizer, self.prompts, self.every, self.output_dir, self.max_new_tokens = tokenizer, prompts, every, output_dir, max_new_tokens

    def __call__(self, trainer, info):
        if not due(info.step, self.every) and not (self.every and info.step == trainer.num_steps):
            return
        with evaluating(trainer) as model:  # on every rank: split weights need all of them
            answers = Engine(for_generation(model), self.tokenizer).generate([ids for _, ids in self.prompts], max_new_tokens=self.max_new_tokens)
        lines = [f"- {text} → {row[0].text!r}" for (text, _), row in zip(self.prompts, answers, strict=True)]
        say(trainer.accelerator, f"step {info.step}: samples", *lines)
        if trainer.accelerator.is_main_process and self.output_dir:
            Path(self.output_dir, "samples.md").write_text("\n".join(lines) + "\n")


class Save:
    """A checkpoint every `every` steps, every `minutes`, at the end and whenever a stop was asked for."""

    def __init__(self, output_dir, tokenizer, settings, *, every, keep, minutes=0.0):
        self.output_dir, self.tokenizer, self.settings, self.every, self.keep = output_dir, tokenizer, settings, every, keep
        self.seconds, self.last = minutes * 60, time.monotonic()

    def __call__(self, trainer, info):
        late = bool(self.seconds) and agree(trainer.accelerator, time.monotonic() - self.last >= self.seconds)
        if late or due(info.step, self.every) or info.step == trainer.num_steps or trainer.stopped:
            run = wandb_run_id(trainer.accelerator)
            folder = checkpoint.save(trainer, self.output_dir, self.tokenizer, self.settings, self.keep, {"wandb": run} if run else {})
            self.last = time.monotonic()
            say(trainer.accelerator, f"step {info.step}: saved {folder}")


class CollectGarbage:
    """Stops Python's own collections, which pause a step at random, and collects every `every` steps; the reference found it useful."""

    def __init__(self, every=5000):
        import gc

        self.gc, self.every = gc, every
        gc.collect()
        gc.freeze()
        gc.disable()

    def __call__(self, trainer, info):
        if due(info.step, self.every):
            self.gc.collect()
        if info.step == trainer.num_steps or trainer.stopped:
            self.gc.enable()
            self.gc.unfreeze()
