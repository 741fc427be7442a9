"""A tiny model, its conversations, and scripts.chat_sft on them as users start it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.tokenizer import train_tokenizer
from tests.support.processes import Run

STEPS = 8


def save_model(folder, layers=2):
    """Write a tiny model and its tokenizer, the same every time, into `folder`."""
    tokenizer = train_tokenizer(["The cat counted 12 letters, then 7 more."] * 3, 280)
    torch.manual_seed(0)
    config = NanochatConfig(
        vocab_size=280,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    NanochatForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A folder with a tiny model and its conversations, which no test writes to."""
    folder = tmp_path_factory.mktemp("start")
    save_model(folder / "model")
    rows = [
        [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} " * (i % 7 + 1)}]
        for i in range(300)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def whole(start, tmp_path_factory):
    """Uninterrupted runs on 1 and 2 processes."""
    root = tmp_path_factory.mktemp("whole")
    runs = {world: train(start, root / str(world), root / f"{world}.log", world) for world in (1, 2)}
    for world, run in runs.items():
        assert run.wait() == [0] * world, run.text()
    return root


def flags(start, output, world=1, **changed):
    """Flags of a small run whose batch does not depend on the number of processes."""
    settings = {
        "model": start / "model",
        "data": start / "chats.jsonl",
        "output_dir": output,
        "num_steps": STEPS,
        "max_seq_len": 64,
        "device_batch_size": 6 // world,
        "total_batch_size": 6 * 64,
        "eval_every": 0,
        "eval_batches": 1,
        "save_every": 2,
        "log_every": 1,
        "dtype": "float32",
    } | changed
    return [
        part for name, value in settings.items() if value is not None for part in (f"--{name.replace('_', '-')}", value)
    ]


def train(start, output, log, world=1, environment=None, limit=None, **changed):
    """A Run of scripts.chat_sft with `flags`."""
    return Run("scripts.chat_sft", flags(start, output, world, **changed), log, world, environment, limit)


def here(start, output, **changed):
    """The exit code of scripts.chat_sft with `flags`, in this process: half a second where a fresh one takes four."""
    from nanochat_hf.cli import chat_sft

    with pytest.raises(SystemExit) as ended:
        chat_sft.main([str(part) for part in flags(start, output, **({"attn": "sdpa", "compile": False} | changed))])
    return ended.value.code


def weights(folder):
    """The tensors of a run's final model."""
    return load_file(folder / "final" / "model.safetensors")
