"""CORE in batches beside one item at a time.

python -m scripts.bench core --core-data eval_bundle.zip (--model DIR | --depth N --vocab-size V)

One item at a time is what the definition says and most implementations do: its options stacked, a whole forward pass,
logits everywhere.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanochat_hf import NanochatForCausalLM
from nanochat_hf.config import user_errors
from nanochat_hf.evals.bpb import beginning, encode_texts
from nanochat_hf.evals.core import BUNDLE_HELP, load_bundle, prompts, spans
from nanochat_hf.evals.core_scoring import CoreOptions, evaluate_core_task
from nanochat_hf.scaling import model_config
from nanochat_hf.tokenizer import train_tokenizer
from scripts.benchmarks.measure import report, wait


@torch.no_grad()
def one_at_a_time(model, tokenizer, task, limit):
    """Whether each item is right, the plain way."""
    items, right = task.chosen(limit), []
    for index, item in enumerate(items):
        texts = [beginning(tokenizer) + ids for ids in encode_texts(tokenizer, prompts(task, items, index))]
        scored = spans(task, texts, getattr(model.config, "max_position_embeddings", None))
        longest = max(len(ids) for ids, _ in scored)
        logits = model(
            torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in scored], device=model.device), use_cache=False
        ).logits
        losses = []
        for row, (ids, start) in zip(logits, scored, strict=True):
            targets = torch.tensor(ids[start:], device=model.device)
            if task.kind == "language_modeling":
                right.append(float((row[start - 1 : len(ids) - 1].argmax(-1) == targets).all()))
            losses.append(F.cross_entropy(row[start - 1 : len(ids) - 1].float(), targets).item())
        if task.kind != "language_modeling":
            right.append(float(losses.index(min(losses)) == item["gold"]))
    return right


def random_model(args, tasks, device):
    """A model with random weights, moved off zero, and a tokenizer trained on the tasks' own text."""
    texts = [prompts(task, task.items, i)[-1] for task in tasks for i in range(min(60, len(task.items)))]
    tokenizer = (
        AutoTokenizer.from_pretrained(args.tokenizer) if args.tokenizer else train_tokenizer(texts, args.vocab_size)
    )
    torch.manual_seed(0)
    with device:
        model = NanochatForCausalLM(model_config(args.depth, len(tokenizer)))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.02)
    return model.eval(), tokenizer


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench core", description=__doc__)
    parser.add_argument("--core-data", required=True, help=BUNDLE_HELP)
    parser.add_argument("--model", help="folder or Hub name; without it, random weights")
    parser.add_argument("--depth", type=int, default=4, help="layers of the model with random weights")
    parser.add_argument(
        "--vocab-size", type=int, default=4096, help="tokens of its tokenizer, trained on the tasks' text"
    )
    parser.add_argument("--tokenizer", help="a tokenizer's folder, in place of training one")
    parser.add_argument(
        "--items", type=int, default=12, help="items of each task (above the number of few-shot examples)"
    )
    parser.add_argument("--batch-tokens", type=int, default=8192, help="positions in a forward pass of the batched way")
    parser.add_argument("--repeats", type=int, default=2, help="A B pairs, of which the median counts")
    parser.add_argument("--tasks", help="labels, with commas (default: all that have data)")
    parser.add_argument("--json", help="also write the figures there")
    args = parser.parse_args(argv)
    tasks, _ = load_bundle(args.core_data)
    tasks = [t for t in tasks if not args.tasks or t.label in args.tasks.split(",")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.model:
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(args.model).eval().to(device),
            AutoTokenizer.from_pretrained(args.model),
        )
    else:
        model, tokenizer = random_model(args, tasks, device)
    times = {task.label: ([], []) for task in tasks}
    agreeing = total = 0
    for _ in range(args.repeats):
        for task in tasks:
            results = []
            ways = (
                one_at_a_time,
                lambda m, t, task, n: evaluate_core_task(
                    m, t, task, options=CoreOptions(n, args.batch_tokens, progress=False)
                ).tolist(),
            )
            for way, seconds in zip(ways, times[task.label], strict=True):
                wait(device)
                start = time.perf_counter()
                results.append(way(model, tokenizer, task, args.items))
                wait(device)
                seconds.append(time.perf_counter() - start)
            agreeing += sum(a == b for a, b in zip(*results, strict=True))
            total += len(results[0])
    rows = []
    for task in tasks:
        one, many = (statistics.median(seconds) for seconds in times[task.label])
        rows.append(
            {"task": task.label, "kind": task.kind, "one at a time s": one, "batched s": many, "times": one / many}
        )
    one, many = (sum(row[key] for row in rows) for key in ("one at a time s", "batched s"))
    rows.append({"task": "all", "kind": "", "one at a time s": one, "batched s": many, "times": one / many})
    report(rows, args.json)
    print(f"same decision for {agreeing} of {total} items; {len(tokenizer):,} tokens of vocabulary, {device}")


if __name__ == "__main__":
    main()
