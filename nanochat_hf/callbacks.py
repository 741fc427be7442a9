"""What happens during training beside the steps. Each callback owns its cadence and is called with (trainer, StepInfo)."""

import time

from . import checkpoint
from .evals.bpb import evaluate_bpb
from .runtime import peak_flops, sum_over_ranks
from .tracking import Ema, MetricsFile, Progress


def due(step, every, last):
    """True when `step` is on the cadence `every` (0: never), and not the last step, which callers treat by themselves."""
    return bool(every) and step % every == 0 and step != last


class Log:
    """Every step the bar; every `every` steps the trackers and metrics.jsonl."""

    def __init__(self, trainer, *, description, flops_per_token, every=10, output_dir=None):
        self.every, self.flops, self.ema = every, flops_per_token, Ema(0.9)
        self.peak = peak_flops(trainer.accelerator.device)
        main = trainer.accelerator.is_main_process
        self.metrics = MetricsFile(f"{output_dir}/metrics.jsonl" if output_dir and main else None)
        self.progress = Progress(trainer.accelerator, trainer.num_steps, trainer.state.step, description)
        self.clock, self.tokens, self.figures = time.perf_counter(), trainer.state.tokens, {}

    def __call__(self, trainer, info):
        if info.step % self.every and info.step != trainer.num_steps:
            self.progress.update(info.step, **self.figures)
            return
        accelerator, state = trainer.accelerator, trainer.state
        loss = self.ema.update(sum_over_ranks(accelerator)(info.loss.float()).item())
        now = time.perf_counter()
        rate = (state.tokens - self.tokens) / (now - self.clock)
        self.clock, self.tokens = now, state.tokens
        values = {
            "train/loss": loss, "train/lr_multiplier": info.lr_multiplier, "train/tokens_per_second": rate,
            "train/step_seconds": info.seconds, "train/tokens": state.tokens, "train/skipped_steps": state.skipped,
            "train/total_flops": self.flops * state.tokens, "train/seconds": state.seconds, "train/epoch": trainer.batches.epoch,
        }  # fmt: skip
        self.figures = {"loss": f"{loss:.3f}", "tok/s": f"{rate:,.0f}"}
        if self.peak:
            values["train/mfu"] = self.flops * rate / (self.peak * accelerator.num_processes)
            self.figures["mfu"] = f"{values['train/mfu']:.1%}"
        accelerator.log(values, step=info.step)
        self.metrics.write(step=info.step, **values)
        self.progress.update(info.step, **self.figures)
        if info.step == trainer.num_steps:
            self.progress.close()


class Evaluate:
    """Bits per byte on fixed validation batches, every `every` steps and at the end; keeps the minimum."""

    def __init__(self, batches, token_bytes, *, every, output_dir=None):
        self.batches, self.token_bytes, self.every, self.output_dir = batches, token_bytes, every, output_dir
        self.best, self.last = float("inf"), float("nan")

    def run(self, trainer):
        """Evaluate now; returns bpb, equal on all ranks."""
        model = trainer.raw_model
        model.eval()
        with trainer.accelerator.autocast():
            self.last = evaluate_bpb(model, self.batches, self.token_bytes, reduce=sum_over_ranks(trainer.accelerator))
        model.train()
        self.best = min(self.best, self.last)
        trainer.accelerator.log({"val/bpb": self.last}, step=trainer.state.step)
        if trainer.accelerator.is_main_process:
            MetricsFile(f"{self.output_dir}/metrics.jsonl" if self.output_dir else None).write(
                step=trainer.state.step, **{"val/bpb": self.last}
            )
        trainer.accelerator.print(f"step {trainer.state.step}: validation {self.last:.4f} bpb")
        return self.last

    def __call__(self, trainer, info):
        if due(info.step, self.every, None) or info.step == trainer.num_steps:
            self.run(trainer)


class Save:
    """A checkpoint every `every` steps and whenever a stop was asked for."""

    def __init__(self, output_dir, tokenizer, settings, *, every, keep):
        self.output_dir, self.tokenizer, self.settings, self.every, self.keep = output_dir, tokenizer, settings, every, keep

    def __call__(self, trainer, info):
        if due(info.step, self.every, None) or info.step == trainer.num_steps or trainer.stopped:
            folder = checkpoint.save(trainer, self.output_dir, self.tokenizer, self.settings, self.keep)
            trainer.accelerator.print(f"step {info.step}: saved {folder}")
