"""transformers' own server with a saved folder, started by our command, which puts the class where it looks."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.interop.folder import export
from nanochat_hf.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-m", "nanochat_hf.cli.serve_transformers"]


def test_chat_completions_are_answered(tmp_path):
    if not all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "openai")):
        pytest.skip("transformers[serving] is not installed")
    tokenizer = train_tokenizer(["The cat sat on the mat and counted 12 letters: naïve café 🙂 3*4"] * 3, 290)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=256)
    model = NanochatForCausalLM(NanochatConfig(vocab_size=290, **sizes))
    torch.nn.init.zeros_(model.lm_head.weight)  # says "!" for ever
    export(model, tokenizer, tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [*CLI, str(tmp_path / "model"), "--trust-remote-code", "--port", str(port), "--host", "127.0.0.1"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        body = {"model": str(tmp_path / "model"), "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        end = time.monotonic() + 240
        while True:
            try:
                answer = json.load(urllib.request.urlopen(request, timeout=60))
                break
            except urllib.error.URLError:
                assert time.monotonic() < end and server.poll() is None
                time.sleep(0.5)
        assert answer["choices"][0]["message"]["content"] == "!!!!!"
    finally:
        server.terminate()
        server.wait(30)
