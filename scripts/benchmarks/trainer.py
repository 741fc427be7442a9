"""What a step of the trainer costs beside forward, backward and optimizer.

python -m scripts.bench trainer --depth 12 [--rows 32]

The whole of Trainer.fit (batches collated from documents in memory by a thread, moved, accumulated, reduced and logged)
against a bare loop over the same compiled model and optimizer with the same batches lying on the device, in turns.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle, islice

import numpy as np

from nanochat_hf import NanochatForCausalLM
from nanochat_hf.data.collate import PackingCollator
from nanochat_hf.data.packing import plan_rows
from nanochat_hf.data.workers import ahead
from nanochat_hf.kernels.lib import cudnn_attention
from nanochat_hf.machine.accelerator import build_accelerator, on_cuda
from nanochat_hf.machine.attention import choose_attention, set_attention
from nanochat_hf.optim import MuonAdamW, apply_schedule, build_param_groups
from nanochat_hf.scaling import accumulation_steps, flops_per_token, model_config
from nanochat_hf.training.callbacks.garbage import CollectGarbage
from nanochat_hf.training.callbacks.log import Log
from nanochat_hf.training.schedules import muon_momentum
from nanochat_hf.training.stopping import StopSignal
from nanochat_hf.training.trainer import Trainer
from scripts.benchmarks.measure import report, wait


class Documents:
    """Micro-batches like fine-tuning's, repeated: documents of log-normal length, a third of their tokens trained."""

    distinct = 8

    def __init__(self, vocab_size, rows, positions):
        rng = np.random.default_rng(0)
        lengths = np.clip(rng.lognormal(5.3, 0.8, 200 + 20 * rows), 8, positions + 1).astype(int).tolist()
        self.documents = [
            {"ids": rng.integers(vocab_size, size=n, dtype=np.int32), "mask": (rng.random(n) < 0.35).astype(np.uint8)}
            for n in lengths
        ]
        self.plan, self.rows = plan_rows(lengths, positions + 1), rows
        self.collate, self.epoch, self.waited = PackingCollator(positions, 0), 0.0, 0.0
        self.made = ahead(self.collated())

    def collated(self):
        """The batches, made when asked for."""
        numbers = np.random.default_rng(1).integers(len(self.plan), size=(self.distinct, self.rows))
        for rows in cycle(numbers):
            yield self.collate([[self.documents[i] for i in self.plan[r]] for r in rows])

    def __iter__(self):
        return self

    def __next__(self):
        start = time.perf_counter()
        batch = next(self.made)
        self.waited += time.perf_counter() - start
        return batch


class Counted:
    """A callback, and the seconds that the host spent in it."""

    def __init__(self, callback):
        self.callback, self.seconds = callback, 0.0

    def __call__(self, trainer, info) -> None:
        """Call it, and add the time."""
        start = time.perf_counter()
        self.callback(trainer, info)
        self.seconds += time.perf_counter() - start


def build(args, accelerator):
    """A Trainer as training/run.py wires it, but for evaluation and saving, which are work of their own."""
    device = accelerator.device
    attention, _ = choose_attention(device, args.attn, cudnn=cudnn_attention)
    with device:
        model = NanochatForCausalLM(model_config(args.depth, args.vocab_size, args.positions))
    set_attention(model, attention)

    def schedule(optimizer, step):
        apply_schedule(optimizer.optimizer, 1e-3, muon_momentum(step))
        return 1e-3

    trainer = Trainer(
        accelerator,
        model,
        MuonAdamW(build_param_groups(model)),
        Documents(args.vocab_size, args.rows, args.positions),
        num_steps=3 + args.rounds * args.steps,
        schedule=schedule,
        stop=StopSignal(accelerator),
        norms_every=args.log_every,
    )
    folder = tempfile.mkdtemp()
    log = Log(
        trainer,
        "bench",
        flops_per_token=flops_per_token(model, args.positions),
        every=args.log_every,
        output_dir=folder,
    )
    trainer.callbacks = [Counted(log), Counted(CollectGarbage())]
    return trainer


def bare(trainer, batches, steps):
    """`steps` of forward, backward and optimizer alone, on batches that lie on the device."""
    optimizer = trainer.optimizer.optimizer
    for _ in range(steps):
        for batch, targets in islice(batches, trainer.accumulation):
            (trainer.model(**batch, num_items_in_batch=1).loss / targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def measure(args):
    """Rounds of both, in turns → rows of the table."""
    accumulation = accumulation_steps(args.total_batch_size, args.rows, args.positions, 1)
    accelerator = build_accelerator(accumulation, dtype=args.dtype, compile=args.compile)
    device, trainer = accelerator.device, build(args, accelerator)
    some = list(islice(trainer.batches.collated(), Documents.distinct))
    borders = trainer.raw_model.base_model.document_borders
    batches = cycle(
        [
            (
                {k: v.to(device) for k, v in b.items()} | borders(b["position_ids"], device),
                trainer.accumulation * int((b["shift_labels"] != -100).sum()),
            )
            for b in some
        ]
    )
    seconds, waited, called = {"trainer": [], "bare": []}, [], []
    for number in range(args.rounds + 1):  # the first compiles and is not counted
        steps = args.steps if number else 3
        for name in ("trainer", "bare"):
            wait(device)
            start, held = time.perf_counter(), (trainer.batches.waited, sum(c.seconds for c in trainer.callbacks))
            if name == "trainer":
                trainer.num_steps = trainer.state.step + steps
                trainer.fit()
            else:
                bare(trainer, batches, steps)
            wait(device)
            if number:
                seconds[name].append((time.perf_counter() - start) / steps * 1e3)
            if number and name == "trainer":
                waited.append((trainer.batches.waited - held[0]) / steps * 1e3)
                called.append((sum(c.seconds for c in trainer.callbacks) - held[1]) / steps * 1e3)
    return table(args, accumulation, seconds, waited, called)


def table(args, accumulation, seconds, waited, called):
    """Medians of the rounds in milliseconds a step, and their shares of the trainer's step."""
    whole, least = (statistics.median(seconds[name]) for name in ("trainer", "bare"))
    pairs = [1 - b / a for a, b in zip(seconds["trainer"], seconds["bare"], strict=True)]
    figures = {
        f"Trainer.fit, d{args.depth}, {accumulation} × {args.rows} × {args.positions}": whole,
        "forward, backward, optimizer alone": least,
        "the rest: loader, moving, logging, Accelerate": whole - least,
        "… of it the host waited for the loader": statistics.median(waited),
        "… of it the host was in callbacks": statistics.median(
            called
        ),  # where a log entry waits for the device, that time is the step's own
    }
    spread = f"{min(pairs):.1%} to {max(pairs):.1%} over {len(pairs)} rounds of {args.steps} steps"
    return [{"what": what, "ms a step": ms, "share": f"{ms / whole:.2%}"} for what, ms in figures.items()], spread


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench trainer", description=__doc__)
    parser.add_argument("--depth", type=int, default=4, help="layers")
    parser.add_argument("--rows", type=int, default=32, help="rows of a micro-batch")
    parser.add_argument("--positions", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--total-batch-size", type=int, help="tokens of an optimizer step (default: one micro-batch)")
    parser.add_argument("--vocab-size", type=int, default=32768, help="tokens in the vocabulary")
    parser.add_argument("--steps", type=int, default=20, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each, in turns; the median counts")
    parser.add_argument("--log-every", type=int, default=10, help="steps between log entries")
    parser.add_argument(
        "--attn",
        default="auto",
        help="attention kernel, as in training: auto, flex_attention, flash_attention_2 to 4, sdpa, ...",
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="autocast precision"
    )
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="cpu: ignore the accelerator")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None, help="torch.compile (default: on CUDA)"
    )
    parser.add_argument("--json", help="also write the figures there")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "1"
    if args.compile is None:
        args.compile = on_cuda()
    rows, spread = measure(args)
    report(rows, args.json)
    print(f"the rest, round by round: {spread}")


if __name__ == "__main__":
    main()
