"""Concurrent streams of the server beside a single one.

python -m scripts.bench serve [--model DIR] [--streams 32] [--tokens 128]

Starts `chat_web` as a process of its own on this machine's loopback and asks it as a client of /v1/chat/completions
does. Without --model it serves random weights in the quickstart's shape, which never end an answer. "one" is the rate
of a single stream, "all" that of --streams at once, in tokens of all streams a second, from the first request sent to
the last token. The spread of the streams tells whether they advance alike.
"""

import argparse
import asyncio
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat_hf import NanochatForCausalLM
from nanochat_hf.cli.quickstart import VOCABULARY, model_config
from nanochat_hf.config import user_errors
from nanochat_hf.tasks.embedded import docstring_corpus
from nanochat_hf.tokenizer import load_tokenizer, train_tokenizer
from scripts.benchmarks.measure import record, report

STARTING = 120  # seconds that the server may take to answer
NAMES = {  # of the columns, in a record
    "tok/s": ("rate", "tokens/s"),
    "first token s": ("slowest first token", "s"),
    "first done s": ("first stream done", "s"),
    "last done s": ("last stream done", "s"),
}
QUESTION = "Spell the word: elephant"


@dataclass(frozen=True)
class Result:
    """One stream: seconds to its first token and to its last, and its tokens."""

    first: float
    last: float
    tokens: int


def random_model(folder: Path) -> None:
    """A model in the quickstart's shape whose likeliest token is never an end token."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(docstring_corpus()[:2000], VOCABULARY)
    model = NanochatForCausalLM(model_config())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
        model.lm_head.weight[-9:] = 0  # the special tokens, so their logit is 0, and the greatest of all is above
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder)


@contextlib.contextmanager
def server(model: str, rows: int) -> Iterator[int]:
    """The port of a running server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--model", model, "--name", "it", "--rows", str(rows), "--port", str(port)]
    process = subprocess.Popen([sys.executable, "-m", "scripts.chat_web", *flags])
    try:
        until = time.monotonic() + STARTING
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > until:
                raise ValueError(f"the server did not start (exit code {process.poll()}); see its output above")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait()


async def stream(port: int, tokens: int) -> Result:
    """Ask once and read the stream to its end."""
    body = {
        "model": "it",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}content-length: {len(sent)}\r\nconnection: close\r\n\r\n".encode() + sent)
    status = await reader.readline()
    if b" 200 " not in status:
        raise OSError(f"{status.decode().strip()}: {(await reader.read())[-300:].decode()}")
    first, counted = 0.0, 0
    async for line in reader:
        if b'"delta":{"content"' in line and not first:
            first = time.perf_counter() - start
        if b'"completion_tokens"' in line:
            counted = json.loads(line[6:])["usage"]["completion_tokens"]
    writer.close()
    if not counted:
        raise OSError("the stream ended without its count of tokens")
    return Result(first, time.perf_counter() - start, counted)


async def together(port: int, streams: int, tokens: int, limit: float) -> tuple[float, list[Result], int]:
    """(tokens a second of all streams, the streams, how many failed)."""
    start = time.perf_counter()
    tasks = [asyncio.wait_for(stream(port, tokens), limit) for _ in range(streams)]
    found = await asyncio.gather(*tasks, return_exceptions=True)
    seconds = time.perf_counter() - start
    results = [one for one in found if isinstance(one, Result)]
    for error in {str(one) or type(one).__name__ for one in found if not isinstance(one, Result)}:
        print(f"failed: {error}", file=sys.stderr)
    return sum(one.tokens for one in results) / seconds, results, streams - len(results)


def measure(port: int, args: argparse.Namespace) -> list[dict]:
    """Both ways, in turns → a dict of figures each."""
    asyncio.run(together(port, 1, 8, args.limit))  # what a first request starts is not measured
    rates: dict[int, list[float]] = {1: [], args.streams: []}
    last: dict[int, list[Result]] = {}
    failed = dict.fromkeys(rates, 0)
    for _ in range(args.repeats):
        for streams in rates:
            rate, last[streams], failures = asyncio.run(together(port, streams, args.tokens, args.limit))
            rates[streams].append(rate)
            failed[streams] += failures
    one = statistics.median(rates[1])
    return [
        {
            "streams": streams,
            "tok/s": statistics.median(found),
            "of one": statistics.median(found) / one,
            "failed": failed[streams],
            "first token s": max((r.first for r in last[streams]), default=float("nan")),
            "first done s": min((r.last for r in last[streams]), default=float("nan")),
            "last done s": max((r.last for r in last[streams]), default=float("nan")),
        }
        for streams, found in rates.items()
    ]


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table; exit code 1 where a stream failed."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench serve", description=__doc__)
    parser.add_argument("--model", help="folder or Hub name; without it, random weights in the quickstart's shape")
    parser.add_argument("--streams", type=int, default=32, help="streams at once")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each, in turns; the median counts")
    parser.add_argument("--limit", type=float, default=120, help="seconds after which a stream has failed")
    parser.add_argument("--json", help="also write the figures there")
    parser.add_argument("--record", help="folder of the record to write")
    args = parser.parse_args(argv)
    if not (2 <= args.streams <= 256 and args.tokens >= 2 and args.repeats >= 1):
        raise ValueError(
            f"--streams {args.streams}, --tokens {args.tokens}, --repeats {args.repeats}: 2 to 256, at least 2 and 1"
        )
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            random_model(Path(folder))
        with server(args.model or folder, args.streams) as port:
            rows = measure(port, args)
    report(rows, args.json)
    if args.record:
        about = f"Streams of {args.tokens} tokens over loopback, {args.repeats} runs of each in turn"
        print(record(args.record, about, rows, NAMES))
    if any(row["failed"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
