"""From nothing to a small chat model on two CPU cores: python -m scripts.quickstart (make quickstart)"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from nanochat_hf.config import user_errors
from nanochat_hf.tasks.embedded import docstring_corpus, words
from nanochat_hf.tasks.generated import spell

ROOT = Path("runs/quickstart")
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
SHAPE = [
    "--device-batch-size",
    "8",
    "--max-seq-len",
    "320",
    "--embedding-lr",
    "0.2",
    "--warmup-steps",
    "10",
    "--warmdown-ratio",
    "0.6",
]
PROMPTS = ("Spell the word: elephant", "How many r are in strawberry?", "What is 123*45?")


def stage(name, made, *command):
    """Run one script unless what it makes is there."""
    if (ROOT / made).exists():
        print(f"[{name}] finished before, skipped ({ROOT / made})", flush=True)
        return
    print(f"\n[{name}] python {' '.join(command)}", flush=True)
    start = time.perf_counter()
    code = subprocess.run([sys.executable, *command], env=os.environ | {"TOKENIZERS_PARALLELISM": "false"}).returncode
    if code:
        sys.exit(f"[{name}] failed with exit code {code}; correct the cause and run again, finished stages are kept")
    print(f"[{name}] {time.perf_counter() - start:.0f} s", flush=True)


def write_text(path):
    """The embedded text, and spellings of training words, so that the tokenizer meets them; the last documents are for validation."""
    if path.is_file():
        return
    ROOT.mkdir(parents=True, exist_ok=True)
    documents = docstring_corpus()
    spellings = [" ".join(spell(w) for w in words("train")[i : i + 40]) for i in range(0, len(words("train")), 40)]
    for target, texts in ((path, documents[:-200] + spellings), (path.with_name("validation.jsonl"), documents[-200:])):
        partial = target.with_suffix(".partial")
        partial.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        partial.rename(target)


@user_errors
def main():
    text = ROOT / "text.jsonl"
    if (ROOT / "text.jsonl").exists() and not (ROOT / "validation.jsonl").exists():
        text.unlink()
    write_text(text)
    stage(
        "tokenizer",
        "tokenizer",
        "-m",
        "scripts.tok_train",
        "--data",
        str(text),
        "--vocab-size",
        "512",
        "--output",
        str(ROOT / "tokenizer"),
        "--max-chars",
        "4000000",
    )
    stage(
        "base",
        "base/final",
        *LAUNCH,
        "-m",
        "scripts.base_train",
        "--data",
        str(text),
        "--validation",
        str(ROOT / "validation.jsonl"),
        "--tokenizer",
        str(ROOT / "tokenizer"),
        "--depth",
        "4",
        "--aspect-ratio",
        "48",
        "--head-dim",
        "64",
        "--num-steps",
        "200",
        "--eval-every",
        "0",
        "--scale-lr-to-batch",
        "false",
        "--weight-decay",
        "0",
        "--resume",
        "auto",
        "--output-dir",
        str(ROOT / "base"),
        *SHAPE,
    )
    stage(
        "sft",
        "sft/final",
        *LAUNCH,
        "-m",
        "scripts.chat_sft",
        "--config",
        "scripts/recipes/quickstart.yaml",
        "--model",
        str(ROOT / "base/final"),
        "--num-steps",
        "900",
        "--resume",
        "auto",
        "--output-dir",
        str(ROOT / "sft"),
    )
    model = str(ROOT / "sft/final")
    stage(
        "evaluation",
        "answers.json",
        "-m",
        "scripts.chat_eval",
        "--model",
        model,
        "--tasks",
        "simple_spelling,spelling_bee,calculator,identity",
        "--limit",
        "200",
        "--output",
        str(ROOT / "answers.json"),
    )
    for prompt in PROMPTS:
        print(f"\n> {prompt}", flush=True)
        subprocess.run([sys.executable, "-m", "scripts.chat_cli", "--model", model, "-p", prompt], check=True)
    print(f"\nThe model lies in {model}. Next:\n  .venv/bin/python -m scripts.chat_cli --model {model}")
    print(f"  .venv/bin/python -m scripts.chat_eval --model {model} --tasks spelling_bee --limit 500")
    print(
        f"  .venv/bin/accelerate launch -m scripts.chat_sft --model {model} --data YOUR_CHATS.jsonl --output-dir runs/my --max-seq-len 320"
    )


if __name__ == "__main__":
    main()
