"""Tokens a second beside transformers' generate.

python -m scripts.bench generate (--model DIR | --depth N) [--batch 1 --batch 64]

Greedy, every row to its full length. Prefill is the time to the first token; decode is the rest, per token of all rows.
The ways take turns in one run and the median of the repeats counts. "generate" is model.generate with transformers'
defaults: eager, a dynamic cache.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from nanochat_hf import NanochatForCausalLM
from nanochat_hf.config import user_errors
from nanochat_hf.generation import Engine
from nanochat_hf.scaling import model_config
from scripts.benchmarks.measure import peak_memory, report, wait


class NoTokens:
    """A tokenizer for random weights, whose ids mean nothing: no special token, so no row ends early."""

    pad_token_id, eos_token_id = 0, None

    def get_vocab(self) -> dict[str, int]:
        """No tokens."""
        return {}

    def decode(self, ids: Sequence[int]) -> str:
        """No text."""
        return ""


def load(args, device, dtype):
    """The model, its own or of random weights that are not zero."""
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval().to(device)
    torch.manual_seed(0)
    model = NanochatForCausalLM(model_config(args.depth, args.vocab_size, args.positions)).to(device, dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    model.set_attn_implementation("sdpa")
    return model


def ways(model, compiled):
    """Name → function(prompts, new tokens) → ids of all rows."""
    plain = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None, bos_token_id=None)

    def generate(prompts, tokens):
        plain.max_new_tokens = tokens
        ids = torch.tensor(prompts, device=model.device)
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)
        return out[:, ids.shape[1] :].tolist()

    def ours(engine):
        return lambda prompts, tokens: [row.ids for (row,) in engine.generate(prompts, max_new_tokens=tokens)]

    kinds = {"generate": generate, "engine, eager": ours(Engine(model, NoTokens()))}
    return kinds | ({"engine, compiled": ours(Engine(model, NoTokens(), compile=True))} if compiled else {})


def timed(clock, function, device, *arguments):
    """(seconds, result)."""
    wait(device)
    start = clock()
    result = function(*arguments)
    wait(device)
    return clock() - start, result


def measure(model, rows, args):
    """All ways at one batch size → a dict of figures each."""
    device, kinds = model.device, ways(model, args.compile)
    clock = time.process_time if args.cpu_time else time.perf_counter
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, model.config.vocab_size, (rows, args.prompt), generator=generator).tolist()
    first, whole, texts, warmup = {n: [] for n in kinds}, {n: [] for n in kinds}, {}, {}
    for name, function in kinds.items():  # compiles, and reserves memory
        warmup[name] = timed(time.perf_counter, function, device, prompts, args.tokens)[0]
        function(prompts, 1)
    for _ in range(args.repeats):
        for name, function in kinds.items():
            first[name].append(timed(clock, function, device, prompts, 1)[0])
            seconds, texts[name] = timed(clock, function, device, prompts, args.tokens)
            whole[name].append(seconds)
    out = []
    for name in kinds:
        prefill = statistics.median(first[name])
        decode = statistics.median(b - a for a, b in zip(first[name], whole[name], strict=True))
        same = sum(
            a == b
            for mine, theirs in zip(texts[name], texts["generate"], strict=True)
            for a, b in zip(mine, theirs, strict=True)
        )
        out.append(
            {
                "batch": rows,
                "way": name,
                "prefill tok/s": rows * args.prompt / prefill,
                "decode tok/s": rows * (args.tokens - 1) / decode,
                "ms a token": 1e3 * decode / (args.tokens - 1),
                "first call s": warmup[name],
                "same tokens": same / (rows * args.tokens),
            }
        )
    return out


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench generate", description=__doc__)
    parser.add_argument("--model", help="folder or Hub name; without it, random weights")
    parser.add_argument("--depth", type=int, default=4, help="layers of the model with random weights")
    parser.add_argument("--vocab-size", type=int, default=32768, help="tokens in its vocabulary")
    parser.add_argument(
        "--positions", type=int, default=2048, help="positions of its training rows, of which short windows see half"
    )
    parser.add_argument("--batch", type=int, action="append", help="rows at once (default 1 and 64)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    parser.add_argument(
        "--repeats", type=int, default=5, help="timings of each way, in turns, of which the median counts"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out the compiled engine")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count this process's CPU time: steadier where others share the cores"
    )
    parser.add_argument("--json", help="also write the figures there")
    args = parser.parse_args(argv)
    if args.tokens < 2 or args.prompt < 1 or args.repeats < 1:
        raise ValueError(
            f"--tokens {args.tokens}, --prompt {args.prompt}, --repeats {args.repeats}: at least 2, 1 and 1"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if args.cpu_time and device.type != "cpu":
        raise ValueError(f"--cpu-time says nothing about the work of {device.type}; leave it out")
    model, rows = load(args, device, dtype), []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name}, {dtype}, torch {torch.__version__}, prompt {args.prompt}, {args.tokens} new tokens, "
        f"{args.repeats} repeats",
        flush=True,
    )
    for batch in args.batch or [1, 64]:
        rows += measure(model, batch, args)
        gc.collect()
    report(rows, args.json)
    peak = peak_memory(device)
    if peak:
        print(f"peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
