"""Tokens per second of the data's way: python -m scripts.bench data --tokenizer DIR [--chats FILE] [--text FILES]"""

import os
import time
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from nanochat_hf.config import parse, user_errors
from nanochat_hf.conversation import PlainEncoder, layout
from nanochat_hf.data import SFTBatches, SourceConfig, TextBatches, conversations
from nanochat_hf.packing import plan_rows
from nanochat_hf.tokenizer import load_tokenizer
from scripts.benchmarks.measure import report


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
    step_ms: float | None = field(default=None, metadata={"help": "milliseconds the model takes for a micro-batch of that shape, to compare with"})
    json: str | None = field(default=None, metadata={"help": "write the table there, as JSON"})


@user_errors
def main(argv=None):
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
    report([row | _against(row, config) for row in rows], config.json)


def chats(config, tokenizer):
    """Rows of the table for conversations: bare encoding, rendering, collating, and the whole loader."""
    source, encoder = SourceConfig(path=config.chats, rows=config.count), PlainEncoder(tokenizer)
    said = list(conversations(source))
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
        "tokenizers, encode_batch": parts(lambda cs: bare.encode_batch([t for c in cs for t in texts[id(c)]], add_special_tokens=False)),
        "tokenizers, encode_batch_fast": parts(
            lambda cs: bare.encode_batch_fast([t for c in cs for t in texts[id(c)]], add_special_tokens=False)
        ),
        "render to ids and mask": parts(encoder.render),
    }
    seconds = alternating(ways, config.repeats)
    table = [line(name, tokens, seconds[name]) for name in ways]
    start = time.perf_counter()
    batches = SFTBatches([SourceConfig(path=config.chats)], tokenizer, rows=config.device_batch_size, positions=config.max_seq_len)
    total = int(batches.documents.lengths.sum())
    table.append(line("SFTBatches: read, tokenise or cache, plan", total, time.perf_counter() - start))
    planned = [[batches.planned[g] for g in range(i, i + config.device_batch_size)] for i in range(0, config.batches * config.device_batch_size, config.device_batch_size)]
    positions = config.batches * config.device_batch_size * config.max_seq_len
    seconds = alternating({"collate": lambda: [batches.collate(rows) for rows in planned]}, config.repeats)
    table.append(line("collate", positions, seconds["collate"]))
    for workers in (0, 1):
        batches.num_workers = workers
        table.append(line(f"SFTBatches to the loop, {workers or 'thread'}{' worker' * workers}", positions, loop(batches, config.batches)))
    return table


def text(config, tokenizer, mode, streaming):
    """Plain text through reading, tokenising, packing and collating."""
    batches = TextBatches(
        SourceConfig(path=config.text), tokenizer, rows=config.device_batch_size, positions=config.max_seq_len, mode=mode, streaming=streaming
    )
    name = f"TextBatches to the loop, {mode}, {'stream' if streaming else 'mapped'}"
    return line(name, config.batches * config.device_batch_size * config.max_seq_len, loop(batches, config.batches))


def planning(count=860_000, capacity=2049):
    """plan_rows on as many lengths as the reference's mixture has."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, count), 10, capacity).astype(int).tolist()
    start = time.perf_counter()
    rows = plan_rows(lengths, capacity)
    seconds = time.perf_counter() - start
    return line(f"plan_rows, {count:,} lengths, padding {1 - sum(lengths) / (len(rows) * capacity):.3%}", sum(lengths), seconds)


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
    """Median seconds of each function, measured in turns, since a shared machine's speed drifts."""
    seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, function in ways.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def line(name, tokens, seconds):
    """One row of the table."""
    return {"what": name, "tokens": float(tokens), "seconds": seconds, "tokens/s": tokens / seconds}


def _against(row, config):
    if config.step_ms is None:
        return {}
    return {"of the model's need": row["tokens/s"] / (config.device_batch_size * config.max_seq_len / config.step_ms * 1e3)}


if __name__ == "__main__":
    main()
