"""What the tests of the Hub share: a Hub on loopback, a finished run, a push."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.hub.push import HubPusher
from nanochat_hf.interop.folder import export
from nanochat_hf.tokenizer import train_tokenizer
from tests.support.hub_server import HubServer

TOKEN = "hf_secretOfThisTest"
ROOT = Path(__file__).parents[2]
SETTINGS = {
    "output_dir": "/home/someone/runs/sft",
    "model": "org/base@v2",
    "num_steps": 4,
    "matrix_lr": 0.02,
    "num_processes": 2,
    "device_name": "H100",
    "mixed_precision": "bf16",
    "torch_version": "2.13.0",
    "git_revision": "0123456789abcdef",
    "train_data": [{"path": "org/chats", "task": None}, {"path": None, "task": "spelling_bee"}],
}
METRICS = [
    {"step": 2, "train/loss": 3.0, "train/lr_multiplier": 1.0, "train/tokens_per_second": 90.0},
    {"step": 2, "val/bpb": 1.25},
    {"step": 4, "val/bpb": 1.5},
    {
        "step": 4,
        "train/loss": 2.5,
        "train/lr_multiplier": 0.1,
        "train/tokens_per_second": 100.0,
        "train/tokens": 40960,
        "train/total_flops": 3.2e12,
        "train/seconds": 125.0,
        "train/mfu": 0.42,
        "grad_norm/matrix": 0.5,
        "val/odd": float("nan"),
    },
]


def environment(hub, folder, token=TOKEN):
    """Variables for another process that knows only this Hub."""
    own = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "HF_TOKEN": token,
    }
    return os.environ | own | {"HF_HOME": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process's client talks to."""
    with HubServer({TOKEN: "user"}, multipart_above=100_000) as server:
        for name, value in {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": "/no/token",
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run's output folder: final/, config.json, metrics.jsonl."""
    run = tmp_path_factory.mktemp("runs") / "sft"
    tokenizer = train_tokenizer(["why is the sky blue and the sea green? " * 20], 270)
    ids = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    model = NanochatForCausalLM(
        NanochatConfig(
            vocab_size=270,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            **ids,
        )
    )
    run.mkdir()
    export(model, tokenizer, run / "final")
    (run / "config.json").write_text(json.dumps(SETTINGS))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS) + '{"step": 5, "train/lo')
    return run


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "sft"))


def push(run, *, said=None, repo_id="user/tiny", submit=None, **options):
    pusher = HubPusher(repo_id, wait=0.01, say=(said if said is not None else []).append, **options)
    pusher.submit(run / "final", run_dir=run, **(submit or {}))
    return pusher.finish()
