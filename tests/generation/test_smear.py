"""Models with smear, which need the token before: eager, static and continuous decoding give generate()'s tokens."""

import pytest
import torch

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.generation import Continuous, Engine, Request
from tests.support.generating import PROMPTS, calling, reference, shaken

SIZES = dict(vocab_size=280, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=32)


@pytest.fixture(scope="module")
def model():
    made = shaken(lambda: NanochatForCausalLM(NanochatConfig(**SIZES, smear=True, backout=True)))
    torch.nn.init.constant_(made.model.smear.strength, 1.5)  # so that a wrong neighbour would show
    return made


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)


def quiet(model, tokenizer, **settings):
    return Engine(model, tokenizer, calculator=lambda expression: None, **settings)


def test_the_tokens_depend_on_the_neighbour(model, tokenizer):
    whole = [reference(model, tokenizer, p, 20) for p in PROMPTS]
    strength = model.model.smear.strength
    with torch.no_grad():
        strength.zero_()
        assert [reference(model, tokenizer, p, 20) for p in PROMPTS] != whole
        strength.fill_(1.5)


def test_greedy_is_generate_for_prompts_of_every_length(model, tokenizer, monkeypatch):
    monkeypatch.setattr("nanochat_hf.generation.decoding.GROWTH", 3)
    out = quiet(model, tokenizer).generate(PROMPTS, max_new_tokens=40)
    assert [c.ids for (c,) in out] == [reference(model, tokenizer, p, 40) for p in PROMPTS]


@pytest.mark.parametrize("settings", [{}, dict(temperature=1.0, num_samples=2, seed=[5, 6, 7])])
def test_rows_that_wait_for_their_tool_feed_no_neighbour_twice(model, tokenizer, monkeypatch, uncompiled, settings):
    calling(model, tokenizer, monkeypatch)
    expected = Engine(model, tokenizer).generate(PROMPTS[:3], max_new_tokens=60, **settings)
    assert sum("<|output_start|>12<|output_end|>" in c.text for row in expected for c in row) >= 2
    static = Engine(model, tokenizer, compile=True)
    for static.steps in (8, 1):
        assert static.generate(PROMPTS[:3], max_new_tokens=60, **settings) == expected


@pytest.mark.parametrize("rows", [1, 3, 12])
def test_continuous_rows_give_the_engines_tokens(model, tokenizer, monkeypatch, rows):
    calling(model, tokenizer, monkeypatch)
    settings = dict(temperature=1.0, top_k=40, num_samples=2, max_new_tokens=25)
    expected = Engine(model, tokenizer).generate(PROMPTS, seed=list(range(4)), **settings)
    asked = [Request(prompt, seed=seed, **settings) for seed, prompt in enumerate(PROMPTS)]
    assert Continuous(model, tokenizer, rows=rows, length=80).run(asked) == expected


def test_continuous_steps_that_the_host_does_not_see_give_the_same(model, tokenizer, uncompiled):
    asked = [Request(prompt, max_new_tokens=20) for prompt in PROMPTS]
    engine = Continuous(model, tokenizer, None, rows=4, length=64, compile=True)
    for engine.steps in (1, 8):
        found = [c.ids for (c,) in engine.run(asked)]
        assert found == [reference(model, tokenizer, p, 20) for p in PROMPTS]


def test_the_step_is_traced_whole(model, tokenizer, traced):
    expected = quiet(model, tokenizer).generate(PROMPTS[:1], max_new_tokens=12)
    assert quiet(model, tokenizer, compile=True).generate(PROMPTS[:1], max_new_tokens=12) == expected
