"""Answers of mixed lengths: rows that are refilled, beside a full batch and an engine that waits for the longest.

python -m scripts.bench slots (--model DIR | --depth N) [--rows 256 --answers 2048 --answers 256]

Lengths are uniform between 1 and --tokens. "full" is the rate of a batch in which all rows run to their full length,
so the most that can be had. "waiting" runs batches of --rows answers one after the other with the engine, "refilling"
gives all to Continuous at once; both read each prompt once for its --samples. All figures are answers' tokens a second,
reading of prompts included. The ways take turns and the median of the repeats counts.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from nanochat_hf.config import user_errors
from nanochat_hf.generation import Continuous, Engine, Request
from scripts.benchmarks.generate import NoTokens, load, timed
from scripts.benchmarks.measure import peak_memory, record, report


class Lengths(Engine):
    """An engine whose rows end at lengths of their own, as if the model had ended them."""

    lengths: Sequence[int] = ()

    def _rows(self, count, limit):
        rows = super()._rows(count, limit)
        for row, length in zip(rows, self.lengths, strict=True):
            row.limit = length
        return rows


def workload(args, answers: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of one length, one for each --samples answers, and the answers' lengths."""
    generator = random.Random(0)
    prompts = [[generator.randrange(1, 256) for _ in range(args.prompt)] for _ in range(-(-answers // args.samples))]
    return prompts, [generator.randint(1, args.tokens) for _ in range(answers)]


def ways(model, args, answers: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Name → (what to run, tokens that it makes)."""
    prompts, lengths = workload(args, answers)
    whole = workload(args, args.rows)[0]
    engine = Lengths(model, NoTokens(), compile=args.compile)
    slots = Continuous(model, NoTokens(), rows=args.rows, length=args.prompt + args.tokens, compile=args.compile)
    sampled = dict(temperature=1.0, top_k=50)

    def full() -> None:
        engine.lengths = [args.tokens] * len(whole) * args.samples
        engine.generate(whole, max_new_tokens=args.tokens, num_samples=args.samples, **sampled)

    def waiting() -> None:
        step = args.rows // args.samples
        for first in range(0, len(prompts), step):
            part = prompts[first : first + step]
            engine.lengths = lengths[first * args.samples :][: len(part) * args.samples]
            engine.generate(part, max_new_tokens=args.tokens, num_samples=args.samples, **sampled)

    def refilling() -> None:
        # one request an answer would read its prompt again, so lengths go with the sample: all samples of a request
        # share max_new_tokens, and each is cancelled at its own length
        handles = [
            slots.submit(Request(p, max_new_tokens=args.tokens, num_samples=args.samples, seed=i, **sampled))
            for i, p in enumerate(prompts)
        ]
        while not slots.idle:
            for event in slots.step():
                place = (event.handle - handles[0]) * args.samples + event.sample
                if len(event.completion.ids) >= lengths[place] and not event.done:
                    slots.cancel(event.handle, event.sample)

    made = sum(lengths)
    return {
        "full": (full, args.tokens * len(whole) * args.samples),
        "waiting": (waiting, made),
        "refilling": (refilling, made),
    }


def measure(model, args, answers: int) -> list[dict]:
    """All ways for so many answers → a dict of figures each."""
    kinds = ways(model, args, answers)
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for repeat in range(args.repeats + 1):
        for name, (function, _) in kinds.items():
            taken = timed(time.perf_counter, function, model.device)[0]
            if repeat:  # the first compiles, and reserves memory
                seconds[name].append(taken)
    rates = {name: tokens / statistics.median(seconds[name]) for name, (_, tokens) in kinds.items()}
    return [
        {"answers": answers, "way": name, "tok/s": rate, "of full": rate / rates["full"]}
        for name, rate in rates.items()
    ]


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench slots", description=__doc__)
    parser.add_argument("--model", help="folder or Hub name; without it, random weights")
    parser.add_argument("--depth", type=int, default=4, help="layers of the model with random weights")
    parser.add_argument("--vocab-size", type=int, default=32768, help="tokens in its vocabulary")
    parser.add_argument("--positions", type=int, default=2048, help="positions of its training rows")
    parser.add_argument("--rows", type=int, default=256, help="rows at once")
    parser.add_argument("--answers", type=int, action="append", help="answers in all (default 256 and 2048)")
    parser.add_argument("--samples", type=int, default=16, help="answers to each prompt")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of the longest answer")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each way, in turns; the median counts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--compile", action="store_true", help="compile the steps; on CUDA one graph a step")
    parser.add_argument("--json", help="also write the figures there")
    parser.add_argument("--record", help="folder of the record to write")
    args = parser.parse_args(argv)
    if min(args.rows, args.samples, args.prompt, args.tokens, args.repeats) < 1 or args.rows % args.samples:
        raise ValueError(f"--rows {args.rows} must be a multiple of --samples {args.samples}, all numbers at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    model = load(args, device, dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name}, {dtype}, torch {torch.__version__}, {args.rows} rows, answers of 1 to {args.tokens} tokens",
        flush=True,
    )
    rows = [row for answers in args.answers or [256, 2048] for row in measure(model, args, answers)]
    report(rows, args.json)
    if args.record:
        about = f"{args.rows} rows, {args.samples} answers a prompt, of 1 to {args.tokens} tokens, {args.repeats} runs"
        print(record(args.record, about, rows, {"tok/s": ("rate", "tokens/s")}))
    peak = peak_memory(device)
    if peak:
        print(f"peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
