"""What Python's garbage collector costs the training loop.

python -m scripts.bench collector [--blocks 6] [--steps 60]

One trainer, blocks of steps with the collector running and with it frozen (callbacks.CollectGarbage) by turns, so that
what else the machine does falls on both.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise

import datasets  # noqa: F401  a real run has its objects in memory, and the collector walks over them
import torch

from nanochat_hf import NanochatForCausalLM
from nanochat_hf.machine.accelerator import build_accelerator
from nanochat_hf.optim import MuonAdamW, apply_schedule, build_param_groups
from nanochat_hf.scaling import model_config
from nanochat_hf.training.callbacks.garbage import CollectGarbage
from nanochat_hf.training.trainer import Trainer
from scripts.benchmarks.measure import report, wait
from scripts.benchmarks.train import RandomTokens


class Pauses:
    """Seconds that the collector's own runs took; attached to gc.callbacks."""

    def __init__(self):
        self.seconds, self.begun = [], 0.0

    def __call__(self, phase: str, info: dict) -> None:
        """Note when a collection begins, and how long it took."""
        if phase == "start":
            self.begun = time.perf_counter()
        else:
            self.seconds.append(time.perf_counter() - self.begun)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench collector", description=__doc__)
    parser.add_argument("--depth", type=int, default=4, help="layers")
    parser.add_argument("--rows", type=int, default=1, help="rows of a step")
    parser.add_argument("--positions", type=int, default=64, help="tokens of a row")
    parser.add_argument("--blocks", type=int, default=6, help="blocks of steps, frozen and running by turns")
    parser.add_argument("--steps", type=int, default=60, help="steps of a block")
    args = parser.parse_args(argv)
    accelerator = build_accelerator(1, dtype="bfloat16")
    model = NanochatForCausalLM(model_config(args.depth, 512, args.positions))
    batches = RandomTokens(512, args.rows, args.positions, 0, torch.cuda.is_available())
    optimizer, times, pauses = (
        MuonAdamW(build_param_groups(model)),
        {"running": [], "frozen": []},
        {"running": Pauses(), "frozen": Pauses()},
    )

    def schedule(wrapped, step):
        apply_schedule(wrapped.optimizer, 1.0, 0.95)
        return 1.0

    trainer = Trainer(accelerator, model, optimizer, batches, num_steps=0, schedule=schedule)
    for block in range(args.blocks + 1):
        kind = ("running", "frozen")[block % 2]
        frozen = CollectGarbage() if kind == "frozen" else None
        gc.callbacks.append(pauses[kind])
        mine = []

        def mark(trainer, info, mine=mine):
            wait(accelerator.device)
            mine.append(time.perf_counter())

        trainer.num_steps += args.steps
        trainer.callbacks = [mark, *([frozen] if frozen else [])]
        trainer.fit()
        gc.callbacks.remove(pauses[kind])
        if block:  # the first block warms up
            times[kind] += [b - a for a, b in pairwise(mine)]
        else:
            pauses[kind].seconds.clear()
    full = {"running": full_collection()}
    gc.freeze()
    full["frozen"] = full_collection()
    gc.unfreeze()
    print(", ".join(f"a full collection while {kind} takes {ms:.1f} ms" for kind, ms in full.items()))
    report([row(kind, times[kind], pauses[kind].seconds) for kind in times])


def full_collection():
    """Milliseconds of a collection of all generations, the shortest of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        gc.collect()
        times.append((time.perf_counter() - start) * 1e3)
    return min(times)


def row(kind, times, pauses):
    """One line of the table."""
    ordered = sorted(times)
    return {
        "collector": kind,
        "steps": len(times),
        "median ms": statistics.median(times) * 1e3,
        "p99 ms": ordered[int(0.99 * len(ordered))] * 1e3,
        "collections": len(pauses),
        "ms in them": sum(pauses) * 1e3,
        "longest ms": max(pauses, default=0.0) * 1e3,
        "share": sum(pauses) / sum(times),
    }


if __name__ == "__main__":
    main()
