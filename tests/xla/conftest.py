"""Tests of training on XLA's CPU device, in the venv of `make test-xla`; each run is a process of its own."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

# before torch_xla is imported. The programs are the same at LLVM's level 0, and compile three times as fast
os.environ |= {"PJRT_DEVICE": "CPU", "XLA_FLAGS": "--xla_backend_optimization_level=0", "OMP_NUM_THREADS": "1"}

import pytest

ROOT = Path(__file__).parents[2]
os.environ["PYTHONPATH"] = str(ROOT)  # only nanochat_hf is installed, not scripts
WORDS = (
    "the cat sat on a mat and the dog ran far away from a house with one red door "
    "while birds sang songs over green hills"
).split()
LAUNCH = (
    str(Path(sys.executable).parent / "accelerate"),
    "launch",
    "--config_file",
    str(ROOT / "accelerate_configs/tpu.yaml"),
    "-m",
)


def run(*command, xla=True, timeout=600):
    """Run `python *command` from the repository, on XLA or plainly on the CPU; returns its output."""
    command = command if command[0] == LAUNCH[0] else (sys.executable, *command)
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | {"USE_TORCH_XLA": "true" if xla else "false"},
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def flags(**settings):
    """{"max_seq_len": 64} → ["--max-seq-len", "64"]."""
    return [str(part) for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]


def text(generator, low, high):
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(low, high)))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with a tokenizer, text and conversations."""
    from nanochat_hf.tokenizer import train_tokenizer

    folder, generator = tmp_path_factory.mktemp("data"), random.Random(0)
    documents = [text(generator, 10, 80) for _ in range(600)]
    chats = [[{"role": r, "content": text(generator, 3, 15)} for r in ("user", "assistant")] for _ in range(500)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    train_tokenizer(documents, 320).save_pretrained(folder / "tokenizer")
    return folder


STEPS = 20
SHAPE = dict(
    max_seq_len=64,
    device_batch_size=2,
    total_batch_size=256,
    num_steps=STEPS,
    log_every=1,
    eval_every=10,
    eval_batches=2,
)


@pytest.fixture(scope="session")
def base_flags(data):
    """Flags of base training: two micro-batches a step, windows and value embeddings included."""
    model = dict(depth=2, aspect_ratio=32, head_dim=32, tokenizer=data / "tokenizer")
    return flags(**model, data=data / "text.jsonl", **SHAPE)


@pytest.fixture(scope="session")
def base(data, base_flags):
    """The folder of a base run on XLA, float32 with float32 products in Muon."""
    run(
        "tests/xla/exact_products.py",
        "scripts.base_train",
        *base_flags,
        *flags(output_dir=data / "base", dtype="float32"),
    )
    return data / "base"


@pytest.fixture(scope="session")
def sft_flags(data, base):
    """Flags of fine-tuning the base model."""
    return flags(model=base / "final", data=data / "chats.jsonl", save_every=10, **SHAPE)


@pytest.fixture(scope="session")
def launched(data, sft_flags):
    """The folder of a fine-tuning run in bfloat16, launched with accelerate_configs/tpu.yaml."""
    printed = run(*LAUNCH, "scripts.chat_sft", *sft_flags, *flags(output_dir=data / "launched"))
    assert "xla:0, XLA, mixed precision bf16" in printed
    return data / "launched"
