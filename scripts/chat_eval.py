"""Accuracy of a chat model by real generation: python -m scripts.chat_eval --model DIR --tasks spelling_bee,calculator"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from nanochat_hf import NanochatForCausalLM
from nanochat_hf.config import parse, user_errors
from nanochat_hf.evals.chat import chat_core, evaluate_task
from nanochat_hf.tasks import get_task
from nanochat_hf.tokenizer import load_tokenizer

CHAT_CORE = {"mmlu", "arc_easy", "arc_challenge", "gsm8k", "humaneval", "spelling_bee"}


@dataclass(frozen=True)
class EvalConfig:
    """Which model, on what."""

    model: str = field(metadata={"help": "folder or Hub name"})
    tasks: str = field(default="simple_spelling,spelling_bee,calculator", metadata={"help": "task names, with commas"})
    limit: int = field(default=200, metadata={"help": "held-out questions a task"})
    batch_size: int = field(default=64, metadata={"help": "questions answered at once"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer in tokens"})
    output: str | None = field(default=None, metadata={"help": "JSON file for every answer"})


@user_errors
def main(argv=None):
    config, lists = parse([EvalConfig], argv, lists=("eval_data",), description=__doc__)
    entries = lists.get("eval_data") or [{"task": name} for name in config.tasks.split(",")]
    tasks = [(get_task(entry["task"]), entry.get("path")) for entry in entries]
    if config.limit < 1 or config.batch_size < 1 or config.max_new_tokens < 1:
        raise ValueError(f"--limit {config.limit}, --batch-size {config.batch_size}, --max-new-tokens {config.max_new_tokens}: each must be at least 1")
    tokenizer = load_tokenizer(config.model)
    model = NanochatForCausalLM.from_pretrained(config.model).eval()
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    results = []
    for task, path in tasks:
        rows = task.load("test", path=path, limit=config.limit)
        results.append(evaluate_task(model, tokenizer, task, rows, batch_size=config.batch_size, max_new_tokens=config.max_new_tokens))
    print(f"{'task':<18}{'accuracy':>10}{'± stderr':>10}{'questions':>11}")
    for r in results:
        print(f"{r.name:<18}{r.accuracy:>10.1%}{r.stderr:>10.1%}{r.total:>11}")
    core = [(result, task.baseline) for (task, _), result in zip(tasks, results, strict=True) if task.name in CHAT_CORE]
    if core:
        missing = sorted(CHAT_CORE - {result.name for result, _ in core})
        print(f"ChatCORE {chat_core(core):.4f}" + (f", partial: without {', '.join(missing)}" if missing else ""))
    if config.output:
        Path(config.output).write_text(json.dumps([asdict(r) | {"accuracy": r.accuracy} for r in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
