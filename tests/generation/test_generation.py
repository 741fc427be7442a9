"""The engine: sampling, seeds, samples of one prefill, rows that leave, tools in batches, compilation, other models."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from nanochat_hf.generation import Engine, answer_parts, check_sampling, draw_uniforms, sample
from tests.support.generating import PROMPTS, calling, reference, shaken


def quiet(model, tokenizer, **settings):
    return Engine(model, tokenizer, calculator=lambda expression: None, **settings)


def test_greedy_is_generate_beyond_the_window_and_the_buffer(model, tokenizer, monkeypatch):
    monkeypatch.setattr("nanochat_hf.generation.decoding.GROWTH", 3)  # so that buffers grow often
    out = quiet(model, tokenizer).generate(PROMPTS, max_new_tokens=40)
    assert [c.ids for (c,) in out] == [reference(model, tokenizer, p, 40) for p in PROMPTS]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_any_causal_model_can_be_generated_with(tokenizer, attention):
    gpt2 = shaken(
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=280, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0)
        )
    )
    gpt2.set_attn_implementation(attention)
    out = quiet(gpt2, tokenizer).generate(PROMPTS, max_new_tokens=12)
    assert [c.ids for (c,) in out] == [reference(gpt2, tokenizer, p, 12) for p in PROMPTS]


def test_eager_attention_gives_the_same(model, tokenizer):
    expected = quiet(model, tokenizer).generate(PROMPTS, max_new_tokens=12)
    model.set_attn_implementation("eager")
    try:
        assert quiet(model, tokenizer).generate(PROMPTS, max_new_tokens=12) == expected
        with pytest.raises(ValueError, match="needs attention sdpa"):
            Engine(model, tokenizer, compile=True)
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("settings", [{}, dict(temperature=1.0, top_k=40, top_p=0.95, num_samples=2, seed=[3, 4, 5])])
def test_static_cache_gives_the_same(model, tokenizer, traced, steps, settings):
    expected = quiet(model, tokenizer).generate(PROMPTS[:3], max_new_tokens=42, **settings)
    static = quiet(model, tokenizer, compile=True)
    static.steps = steps
    for _ in range(2):  # the second call reuses the cache of the first
        assert static.generate(PROMPTS[:3], max_new_tokens=42, **settings) == expected
    if not settings:
        assert static.generate(PROMPTS[:1], max_new_tokens=1) == quiet(model, tokenizer).generate(
            PROMPTS[:1], max_new_tokens=1
        )


def test_static_cache_serves_other_models(tokenizer, traced):
    gpt2 = shaken(
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=280, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0)
        )
    )
    assert quiet(gpt2, tokenizer, compile=True).generate(PROMPTS, max_new_tokens=12) == quiet(gpt2, tokenizer).generate(
        PROMPTS, max_new_tokens=12
    )


def test_a_compiled_engine_refuses_the_windows_of_other_models(tokenizer):
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    windowed = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=8)).eval()
    with pytest.raises(ValueError, match="cannot decode mistral with its sliding_window=8.*leave compile out"):
        Engine(windowed, tokenizer, compile=True)
    plain = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=None)).eval()
    assert Engine(plain, tokenizer, compile=True).static.window is None


@pytest.mark.slow
def test_compiled_code_gives_the_same(model, tokenizer):
    expected = quiet(model, tokenizer).generate(PROMPTS[:3], max_new_tokens=24)
    assert quiet(model, tokenizer, compile=True).generate(PROMPTS[:3], max_new_tokens=24) == expected


def test_a_sample_does_not_depend_on_its_batch_mates(model, tokenizer):
    settings = dict(max_new_tokens=16, temperature=1.0, top_k=40, top_p=0.95, num_samples=3)
    engine, seeds = quiet(model, tokenizer), [11, 12, 13, 14]
    together = engine.generate(PROMPTS, seed=seeds, **settings)
    assert [engine.generate([p], seed=s, **settings)[0] for p, s in zip(PROMPTS, seeds, strict=True)] == together
    assert len({tuple(c.ids) for c in together[0]}) > 1, "samples of one prompt differ"
    assert engine.generate(PROMPTS[::-1], seed=seeds[::-1], **settings)[::-1] == together
    assert engine.generate(PROMPTS, seed=15, **settings) != together


def test_one_prefill_whatever_the_samples(model, tokenizer, monkeypatch):
    shapes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **k: shapes.append(tuple(k["input_ids"].shape)) or forward(**k))
    quiet(model, tokenizer).generate([[1, 2, 3]], max_new_tokens=3, temperature=1.0, num_samples=5)
    assert shapes[0] == (1, 3) and shapes[1][1] == 1 and shapes[1][0] <= 5


def test_finished_rows_leave_the_batch(model, tokenizer, monkeypatch):
    alone = quiet(model, tokenizer).generate(PROMPTS, max_new_tokens=12)
    engine, rows, forward = quiet(model, tokenizer), [], model.forward
    late = {c.ids[4] for (c,) in alone[:2]}  # rows 0 and 1 end at their fifth token, or earlier
    engine.ends = frozenset(late)
    monkeypatch.setattr(model, "forward", lambda **k: rows.append(len(k["input_ids"])) or forward(**k))
    out = engine.generate(PROMPTS, max_new_tokens=12)
    for (before,), (after,) in zip(alone, out, strict=True):
        stop = next((i for i, token in enumerate(before.ids) if token in late), len(before.ids))
        assert after.ids == before.ids[:stop] and after.finished == (stop < len(before.ids))
    assert rows[0] == 4 and rows[-1] < 4 and rows == sorted(rows, reverse=True)


def scripted(model, monkeypatch, scripts):
    """The model says scripts[row][step], whatever it is fed; returns the tokens that it was fed."""
    fed = []

    def forward(**kwargs):
        output = original(**kwargs)
        step = len(fed)
        fed.append(kwargs["input_ids"][:, -1].tolist())
        logits = torch.full_like(output.logits, -10)
        for row in range(len(logits)):
            logits[row, -1, scripts[row][step]] = 10
        output.logits = logits
        return output

    original = model.forward
    monkeypatch.setattr(model, "forward", forward)
    return fed


def test_tool_results_are_forced_into_their_own_rows_of_a_batch(model, tokenizer, monkeypatch):
    token, encode = tokenizer.convert_tokens_to_ids, lambda t: tokenizer.encode(t, add_special_tokens=False)
    call = [token("<|python_start|>"), *encode("3*4"), token("<|python_end|>")]
    talk = encode("the cat sat on the mat and counted")
    length = 20
    fed = scripted(model, monkeypatch, [(call + talk * 9)[:length], (talk * 9)[:length]])
    first, second = (c for (c,) in Engine(model, tokenizer).generate([[1], [2]], max_new_tokens=length))
    forced = [i for i, f in zip(first.ids, first.forced, strict=True) if f]
    assert (
        tokenizer.decode(forced) == "<|output_start|>12<|output_end|>"
        and first.ids[len(call) :][: len(forced)] == forced
    )
    assert [row[0] for row in fed[1:]] == first.ids[:-1], "the model read the result, not what it would have said"
    assert second.ids == (talk * 9)[:length] and not any(second.forced)
    parts = answer_parts(tokenizer, [*talk, *first.ids[: len(call) + len(forced)]])
    assert parts == [
        {"type": "text", "text": tokenizer.decode(talk)},
        {"type": "python", "text": "3*4"},
        {"type": "python_output", "text": "12"},
    ]
    assert answer_parts(tokenizer, talk) == tokenizer.decode(talk)


@pytest.mark.parametrize("settings", [{}, dict(temperature=1.0, num_samples=2, seed=[5, 6, 7])])
@pytest.mark.parametrize("limit", [9, 60])
def test_rows_that_wait_for_their_tool_leave_holes_that_no_query_sees(model, tokenizer, monkeypatch, settings, limit):
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    calling(model, tokenizer, monkeypatch)
    expected = Engine(model, tokenizer).generate(PROMPTS[:3], max_new_tokens=limit, **settings)
    assert limit < 20 or sum("<|output_start|>12<|output_end|>" in c.text for row in expected for c in row) >= 2
    static = Engine(model, tokenizer, compile=True)
    for static.steps in (8, 3, 1):
        assert static.generate(PROMPTS[:3], max_new_tokens=limit, **settings) == expected
    slate = next(iter(static.static.slates.values()))
    assert slate.left >= 0


def test_a_full_cache_leaves_no_room_for_holes(model, tokenizer, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    monkeypatch.setattr("nanochat_hf.generation.static.BLOCK", 1)  # no slot to spare but those for holes
    calling(model, tokenizer, monkeypatch, every=1)
    expected = Engine(model, tokenizer).generate(PROMPTS[:3], max_new_tokens=150)
    static = Engine(model, tokenizer, compile=True)
    static.steps = 8
    assert static.generate(PROMPTS[:3], max_new_tokens=150) == expected
    assert sum(c.text.count("<|python_end|>") for (c,) in expected) > 10, (
        "so many calls that the room for holes is used up"
    )


def test_stream_is_generate(model, tokenizer):
    for settings in ({}, dict(temperature=0.8, top_k=20, seed=3)):
        engine = Engine(model, tokenizer)
        assert (
            list(engine.stream(PROMPTS[0], max_new_tokens=16, **settings))
            == engine.generate([PROMPTS[0]], max_new_tokens=16, **settings)[0][0].ids
        )


def test_samples_follow_the_distribution_and_its_cuts():
    logits, count = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf]), 40000
    uniforms = (torch.arange(count) + 0.5) / count
    share = lambda **s: torch.bincount(sample(logits.expand(count, -1), uniforms, **s), minlength=5) / count  # noqa: E731
    assert torch.allclose(share(temperature=1.0), logits.softmax(-1), atol=1e-4)
    assert torch.allclose(share(temperature=0.5), (logits / 0.5).softmax(-1), atol=1e-4)
    top = logits[:2].softmax(-1)
    assert (
        torch.allclose(share(temperature=1.0, top_k=2)[:2], top, atol=1e-4)
        and not share(temperature=1.0, top_k=2)[2:].any()
    )
    # probabilities 0.644, 0.237, 0.087, 0.032: the nucleus of 0.7 is the first two
    assert (
        torch.allclose(share(temperature=1.0, top_p=0.7)[:2], top, atol=1e-4)
        and not share(temperature=1.0, top_p=0.7)[2:].any()
    )
    assert share(temperature=1e-40)[0] == 1 and share(temperature=1.0, top_k=99)[4] == 0
    assert sample(logits[None].repeat(2, 1), torch.tensor([0.0, 1.0]), 1.0).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(temperature=-0.1), "temperature=-0.1"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.5), "top_p=1.5"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(num_samples=0), "num_samples=0"),
    ],
)
def test_settings_that_cannot_be_are_named(model, tokenizer, settings, reason):
    with pytest.raises(ValueError, match=reason):
        check_sampling(**settings)
    with pytest.raises(ValueError, match=reason):
        Engine(model, tokenizer).generate([[1]], **settings)


def test_empty_prompts_and_seeds_that_do_not_fit_are_refused(model, tokenizer):
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="non-empty"):
            Engine(model, tokenizer).generate(prompts)
    with pytest.raises(ValueError, match="1 entries for 2 prompts"):
        draw_uniforms([1], 2, 1, 4)
