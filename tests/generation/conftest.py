"""A tokenizer with the tool's tokens, a small model with windows, and compilation that only traces."""

import pytest
import torch

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.tokenizer import train_tokenizer
from tests.support.generating import shaken

TEXT = ["The cat sat on the mat and counted 12 letters: 'letter'.count('t') + 3*4"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT, 280)


@pytest.fixture(scope="module")
def model():
    sizes = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, max_position_embeddings=32)
    return shaken(lambda: NanochatForCausalLM(NanochatConfig(vocab_size=280, **sizes)))


@pytest.fixture
def traced(monkeypatch):
    """torch.compile that traces in full but generates no code, which takes seconds a shape."""
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **settings: compile(function, **(settings | {"backend": "eager"}))
    )
