"""Tokens per second of the data's way.

python -m scripts.bench data --tokenizer DIR [--chats FILE] [--text FILES]
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from nanochat_hf import NanochatForCausalLM
from nanochat_hf.config import parse, user_errors
from nanochat_hf.conversation import PlainEncoder, layout
from nanochat_hf.data.conversations import conversations
from nanochat_hf.data.packing import plan_rows
from nanochat_hf.data.planned import SFTBatches
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.data.streamed import TextBatches
from nanochat_hf.kernels.lib import cudnn_attention
from nanochat_hf.machine.accelerator import build_accelerator, on_cuda
from nanochat_hf.machine.attention import choose_attention
from nanochat_hf.scaling import model_config
from nanochat_hf.tokenizer import load_tokenizer
from scripts.benchmarks.measure import median_ms, report


@dataclass(frozen=True)
class DataBench:
    """What to measure on. One core is used for all but the loaders, which have a thread or a worker beside the loop."""

    tokenizer: str = field(metadata={"help": "folder or Hub name of the tokenizer"})
    chats: str | None = field(default=None, metadata={"help": "conversations: a file or a Hub name"})
    text: str | None = field(default=None, metadata={"help": "plain text: a file or pattern with a column text"})
    count: int = field(default=8000, metadata={"help": "conversations to measure tokenising with"})
    max_seq_len: int = field(default=2048, metadata={"help": "positions of a row"})
    device_batch_size: int = field(default=32, metadata={"help": "rows of a batch"})
    batches: int = field(default=40, metadata={"help": "batches to measure loaders with"})
    repeats: int = field(default=5, metadata={"help": "times of which the median counts"})
    step_ms: float | None = field(
        default=None, metadata={"help": "milliseconds the model takes for a micro-batch of that shape, to compare with"}
    )
    depth: int | None = field(
        default=None, metadata={"help": "measure that on a model of so many layers instead, on the device at hand"}
    )
    json: str | None = field(default=None, metadata={"help": "write the table there, as JSON"})


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # per core
    config, _ = parse([DataBench], argv, description=__doc__)
    if not (config.chats or config.text):
        raise ValueError("nothing to measure on; give --chats, --text or both")
    tokenizer, rows = load_tokenizer(config.tokenizer), []
    if config.chats:
        rows += chats(config, tokenizer)
    if config.text:
        rows += [text(config, tokenizer, mode, streaming) for mode in ("crop", "keep") for streaming in (False, True)]
    rows.append(planning())
    step_ms = config.step_ms or (model_ms(config, len(tokenizer)) if config.depth else None)
    bare = next((row["tokens/s"] for row in rows if "encode_batch_fast" in row["what"]), None)
    report([row | against(row, config, step_ms, bare) for row in rows], config.json)
    if step_ms:
        print(
            f"the model takes {step_ms:.1f} ms for a micro-batch of {config.device_batch_size} × {config.max_seq_len}, "
            "forward and backward"
        )


def chats(config, tokenizer):
    """Rows of the table for conversations: bare encoding, rendering, collating, and the whole loader."""
    source, encoder = SourceConfig(path=config.chats, rows=config.count), PlainEncoder(tokenizer)
    said = [converted.conversation for converted in conversations(source)]
    pieces = [piece for c in said for piece, special, _ in layout(c) if not special]
    bare = encoder.backend
    tokens = sum(len(e.ids) for e in bare.encode_batch_fast(pieces, add_special_tokens=False))

    def parts(function):  # in parts of 500, as datasets.map has them
        def run():
            for i in range(0, len(said), 500):
                function([c for c in said[i : i + 500]])

        return run

    texts = {id(c): [piece for piece, special, _ in layout(c) if not special] for c in said}
    ways = {
        "tokenizers, encode_batch": parts(
            lambda cs: bare.encode_batch([t for c in cs for t in texts[id(c)]], add_special_tokens=False)
        ),
        "tokenizers, encode_batch_fast": parts(
            lambda cs: bare.encode_batch_fast([t for c in cs for t in texts[id(c)]], add_special_tokens=False)
        ),
        "render to ids and mask": parts(encoder.render),
    }
    seconds = alternating(ways, config.repeats)
    table = [line(name, tokens, seconds[name]) for name in ways]
    start = time.perf_counter()
    batches = SFTBatches(
        [SourceConfig(path=config.chats)], tokenizer, rows=config.device_batch_size, positions=config.max_seq_len
    )
    total = int(batches.documents.lengths.sum())
    table.append(line("SFTBatches: read, tokenise or cache, plan", total, time.perf_counter() - start))
    planned = [
        [batches.planned[g] for g in range(i, i + config.device_batch_size)]
        for i in range(0, config.batches * config.device_batch_size, config.device_batch_size)
    ]
    positions = config.batches * config.device_batch_size * config.max_seq_len
    seconds = alternating({"collate": lambda: [batches.collate(rows) for rows in planned]}, config.repeats)
    table.append(line("collate", positions, seconds["collate"]))
    for workers in (0, 1):
        batches.num_workers = workers
        table.append(
            line(
                f"SFTBatches to the loop, {workers or 'thread'}{' worker' * workers}",
                positions,
                loop(batches, config.batches),
            )
        )
    if torch.cuda.is_available():
        batches.num_workers = 0
        table += [copying(batches, config, pinned) for pinned in (True, False)]
    return table


def copying(batches, config, pinned):
    """Move the loader's batches to the GPU as the trainer does, from pinned or from ordinary memory.

    Seconds are the host's, which goes on with its work as soon as it has started the copies.
    """
    some = batches.take(8)
    if not all(value.is_pinned() for batch in some for value in batch.values()):
        raise ValueError("the loader's batches are not pinned, though there is a GPU; pinning failed")
    some = some if pinned else [{key: value.clone() for key, value in batch.items()} for batch in some]

    def move():
        for batch in some:
            for value in batch.values():
                value.to("cuda", non_blocking=True)

    seconds = []
    for _ in range(3 + config.repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        move()
        seconds.append(time.perf_counter() - start)
    name = (
        "to the GPU, pinned by the loader: the host is busy"
        if pinned
        else "to the GPU from ordinary memory: the host is busy"
    )
    return line(name, len(some) * config.device_batch_size * config.max_seq_len, float(np.median(seconds[3:])))


def model_ms(config, vocab_size):
    """Milliseconds of forward and backward of one micro-batch, compiled where training would be compiled."""
    accelerator = build_accelerator(1, dtype="bfloat16", compile=on_cuda())
    device = accelerator.device
    with device:
        model = NanochatForCausalLM(model_config(config.depth, vocab_size, config.max_seq_len))
    model.set_attn_implementation(choose_attention(device, cudnn=cudnn_attention)[0])
    model = accelerator.prepare(model.train())
    ids = torch.randint(vocab_size, (config.device_batch_size, config.max_seq_len), device=device)
    places = torch.arange(config.max_seq_len, device=device).expand_as(ids) % 512  # documents of 512 tokens

    def step():
        model(input_ids=ids, shift_labels=ids, position_ids=places, num_items_in_batch=1).loss.backward()
        model.zero_grad()

    return median_ms(step, device, warmup=2, repeats=config.repeats)


def text(config, tokenizer, mode, streaming):
    """Plain text through reading, tokenising, packing and collating."""
    batches = TextBatches(
        SourceConfig(path=config.text),
        tokenizer,
        rows=config.device_batch_size,
        positions=config.max_seq_len,
        mode=mode,
        streaming=streaming,
    )
    seconds = loop(batches, config.batches)
    read, cropped = (sum(counts[key] for counts in batches.counts) for key in ("read", "cropped"))
    kind = "stream" if streaming else "mapped"
    name = f"TextBatches to the loop, {mode}, {kind}, {cropped / read:.1%} of the tokens discarded"
    return line(name, config.batches * config.device_batch_size * config.max_seq_len, seconds)


def planning(count=860_000, capacity=2049):
    """plan_rows on as many lengths as the reference's mixture has."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, count), 10, capacity).astype(int).tolist()
    start = time.perf_counter()
    rows = plan_rows(lengths, capacity)
    seconds = time.perf_counter() - start
    return line(
        f"plan_rows, {count:,} lengths, padding {1 - sum(lengths) / (len(rows) * capacity):.3%}", sum(lengths), seconds
    )


def loop(batches, count):
    """Seconds of `count` batches behind the first two, the start of processes or a first window not counted."""
    made = iter(batches)
    for _ in islice(made, 2):
        pass
    start = time.perf_counter()
    for _ in islice(made, count):
        pass
    made.close()
    return time.perf_counter() - start


def alternating(ways, repeats):
    """Median CPU seconds of each function, in turns because a shared machine's speed drifts; none has threads."""
    seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, function in ways.items():
            start = time.process_time()
            function()
            seconds[name].append(time.process_time() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def line(name, tokens, seconds):
    """One row of the table."""
    return {"what": name, "tokens": float(tokens), "seconds": seconds, "tokens/s": tokens / seconds}


def against(row, config, step_ms, bare):
    """A row's rate beside bare encoding, if it tokenises, and beside the tokens that the model takes meanwhile."""
    added = {}
    if bare:
        added["of bare encode_batch_fast"] = (
            f"{row['tokens/s'] / bare:.0%}" if "encode" in row["what"] or "render" in row["what"] else ""
        )
    if step_ms:
        added["of the model's need"] = (
            f"{row['tokens/s'] / (config.device_batch_size * config.max_seq_len / step_ms * 1e3):,.1f}×"
        )
    return added


if __name__ == "__main__":
    main()
