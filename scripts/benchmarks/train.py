"""Training speed on random tokens.

python -m scripts.bench train --depth 12 --depth 20 [--rows 32] [--attn auto] [--recipe mar2026]
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Sequence
from itertools import cycle, pairwise

import torch

from nanochat_hf import NanochatForCausalLM, kernels
from nanochat_hf.kernels.lib import cudnn_attention
from nanochat_hf.machine.accelerator import build_accelerator
from nanochat_hf.machine.attention import choose_attention, set_attention
from nanochat_hf.machine.peaks import peak_flops
from nanochat_hf.optim import MuonAdamW, OptimizerConfig, apply_schedule, build_param_groups
from nanochat_hf.recipes import RECIPES
from nanochat_hf.scaling import accumulation_steps, flops_per_token, model_config
from nanochat_hf.training.architecture import ArchitectureConfig, of_recipe
from nanochat_hf.training.schedules import muon_momentum
from nanochat_hf.training.trainer import Trainer
from scripts.benchmarks.measure import peak_memory, report, wait


class RandomTokens:
    """Endless micro-batches of random ids, a few over and over; documents of about `document` tokens, or one a row.

    They are made before any step is timed: training has threads and processes for that.
    """

    epoch, distinct = 0, 4

    def __init__(self, vocab, rows, positions, document, pin):
        generator = torch.Generator().manual_seed(0)
        batches = [self.batch(vocab, rows, positions, document, generator) for _ in range(self.distinct)]
        self.batches = [
            {key: value.pin_memory() if pin else value for key, value in batch.items()} for batch in batches
        ]

    @staticmethod
    def batch(vocab, rows, positions, document, generator):
        """One micro-batch, as the collators make it."""
        ids = torch.randint(vocab, (rows, positions + 1), generator=generator)
        batch = {"input_ids": ids[:, :-1].contiguous(), "shift_labels": ids[:, 1:].contiguous()}
        if document:
            starts = torch.rand(rows, positions, generator=generator) < 1 / document
            starts[:, 0] = True
            place = torch.arange(positions).expand(rows, -1)
            batch["position_ids"] = place - torch.where(starts, place, 0).cummax(1).values
        return batch

    def __iter__(self):
        return cycle(self.batches)


class Timed:
    """Milliseconds of a method, by device events where there are any."""

    def __init__(self, owner, name, device):
        self.times, self.device, self.call = [], device, getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, *args, **kwargs):
        """Call the method, and note when it began and ended."""
        start = moment(self.device)
        result = self.call(*args, **kwargs)
        self.times.append((start, moment(self.device)))
        return result

    def milliseconds(self):
        """All times so far; the device must be idle."""
        return [passed(start, end) for start, end in self.times]


def moment(device):
    """Now: on CUDA as an event in the stream, which nobody waits for; elsewhere the clock's."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def passed(start, end):
    """Milliseconds between two moments; those of CUDA must lie in the past."""
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)


def build(depth, args, device):
    """The model, with attention and kernels as training would choose them, and the name of its attention."""
    attention, _ = choose_attention(device, args.attn, cudnn=cudnn_attention)
    with device:
        fields = of_recipe(args.recipe, ArchitectureConfig)
        model = NanochatForCausalLM(model_config(depth, args.vocab_size, args.positions, **fields))
    set_attention(model, attention)
    if args.kernels:
        dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8": kernels.FLOAT8}
        model.model.training_ops, _ = kernels.choose(model, device, dtypes.get(args.dtype, torch.float32))
    return model, attention


def measure(depth, rows, args):
    """The figures of one configuration by name."""
    accelerator = build_accelerator(
        accumulation_steps(args.total_batch_size, rows, args.positions, 1), dtype=args.dtype, compile=args.compile
    )
    device = accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model, attention = build(depth, args, device)
    optimizer = MuonAdamW(build_param_groups(model, OptimizerConfig(**of_recipe(args.recipe, OptimizerConfig))))

    def schedule(wrapped, step):
        apply_schedule(wrapped.optimizer, 1.0, muon_momentum(step))
        return 1.0

    batches = RandomTokens(args.vocab_size, rows, args.positions, args.document, device.type == "cuda")
    # before Accelerate wraps the optimizer, because its scaler calls the method that it finds then
    update = Timed(optimizer, "step", device)
    trainer = Trainer(accelerator, model, optimizer, batches, num_steps=args.steps + 2, schedule=schedule)
    start, first, marks = time.perf_counter(), [], []

    def mark(trainer, info):
        if info.step == 1:
            wait(device)
            first.append(time.perf_counter() - start)
        marks.append(moment(device))  # later steps do not wait for the device, as in training

    trainer.callbacks = [mark]
    trainer.fit()
    wait(device)
    seconds = statistics.median(passed(a, b) for a, b in pairwise(marks[1:])) / 1e3
    updates = statistics.median(update.milliseconds()[-args.steps :] or [float("nan")])
    tokens = args.total_batch_size
    peak = peak_flops(device)
    figures = {
        "recipe": args.recipe or "none",
        "depth": depth,
        "rows": rows,
        "dtype": args.dtype,
        "attention": attention,
        "documents": args.document,
        "compiled": args.compile,
        "kernels": args.kernels,
        "tok/s": tokens / seconds,
        "step ms": seconds * 1e3,
        "fwd+bwd ms": seconds * 1e3 - updates,
        "optimizer ms": updates,
        "mfu": flops_per_token(model, args.positions) * tokens / seconds / peak if peak else float("nan"),
        "peak GiB": peak_memory(device) or float("nan"),
        "first step s": first[0],
        "overflowed": trainer.state.overflowed,
    }
    if args.profile:
        profile(trainer, batches, depth)
    del trainer, model, optimizer, update
    accelerator.free_memory()
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return figures


def profile(trainer, batches, depth):
    """Print the kernels of one step, the longest first."""
    micro = list(zip(range(trainer.accumulation), batches, strict=False))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with trainer.gradient_sums() as trainer.sums, torch.profiler.profile(activities=activities) as run:
        trainer.step([batch for _, batch in micro])
        wait(trainer.accelerator.device)
    on_device = [
        e for e in run.key_averages() if e.self_device_time_total and e.device_type != torch.autograd.DeviceType.CPU
    ]
    # the optimizer's annotation is the sum of kernels that are counted already
    kernels_run = [e for e in on_device if not e.is_user_annotation]
    total = sum(e.self_device_time_total for e in kernels_run)
    print(f"one step of depth {depth}: {total / 1e3:.1f} ms of kernels")
    for event in sorted(kernels_run, key=lambda e: -e.self_device_time_total)[:40]:
        share = event.self_device_time_total / total
        print(f"  {event.self_device_time_total / 1e3:8.2f} ms {share:6.1%} {event.count:6d} ×  {event.key[:110]}")


def flags() -> argparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench train", description=__doc__)
    parser.add_argument(
        "--depth", type=int, action="append", help="layers; give it several times for several models (default 4)"
    )
    parser.add_argument(
        "--rows", type=int, action="append", help="rows of a micro-batch, one for each --depth (default 32)"
    )
    parser.add_argument(
        "--recipe", action="append", choices=list(RECIPES), help="architecture and optimizer of a date; several compare"
    )
    parser.add_argument("--positions", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--total-batch-size", type=int, default=524288, help="tokens of an optimizer step")
    parser.add_argument("--vocab-size", type=int, default=32768, help="tokens in the vocabulary")
    parser.add_argument(
        "--document", type=int, default=0, help="mean tokens of a packed document, kept apart by the mask; 0: no mask"
    )
    parser.add_argument(
        "--attn",
        default="auto",
        help="attention kernel, as in training: auto, flex_attention, flash_attention_2 to 4, sdpa, ...",
    )
    parser.add_argument(
        "--dtype", default="bfloat16", help="autocast precision, or float8: bfloat16 with float8 products"
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps; the median counts")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="cpu: ignore the accelerator")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None, help="torch.compile (default: on CUDA)"
    )
    parser.add_argument(
        "--kernels", action=argparse.BooleanOptionalAction, default=None, help="fused kernels (default: where they run)"
    )
    parser.add_argument(
        "--baseline", action="store_true", help="measure the plain formulas too, before: uncompiled, SDPA under masks"
    )
    parser.add_argument("--profile", action="store_true", help="print the kernels of one step")
    parser.add_argument("--json", help="also write the figures there")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = flags()
    args = parser.parse_args(argv)
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "1"
    if args.compile is None:
        args.compile = args.device == "auto" and torch.cuda.is_available()
    if args.kernels is None:
        args.kernels = (
            args.device == "auto" and kernels.available(torch.device("cuda" if torch.cuda.is_available() else "cpu"))[0]
        )
    if args.dtype == "float8" and not args.kernels:
        parser.error(
            "--dtype float8 is made of kernels; drop --no-kernels, or use --dtype bfloat16 where there are none"
        )
    depths = args.depth or [4]
    rows = args.rows or [32]
    rows = rows * len(depths) if len(rows) == 1 else rows
    plain = {
        "compile": False,
        "kernels": False,
        "attn": "sdpa",
        "dtype": "bfloat16" if args.dtype == "float8" else args.dtype,
        "profile": False,
    }
    ways = [
        argparse.Namespace(**vars(args) | changes | {"recipe": recipe})
        for recipe in args.recipe or [None]
        for changes in [plain] * args.baseline + [{}]
    ]
    report([measure(depth, n, way) for depth, n in zip(depths, rows, strict=True) for way in ways], args.json)


if __name__ == "__main__":
    main()
