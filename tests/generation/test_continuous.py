"""Continuous batching: the engine's tokens whatever the row and its neighbours, refilling, cancelling, log-probs."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.generation import Continuous, Engine, Request
from nanochat_hf.generation.row_cache import RowCache
from tests.support.generating import PROMPTS, calling, reference, shaken

SAMPLED = dict(temperature=1.0, top_k=40, top_p=0.95, num_samples=3)
LLAMA = dict(vocab_size=280, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
GROUPED = dict(num_key_value_heads=1, head_dim=16, max_position_embeddings=128, sliding_window=8)
OTHERS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=280, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**LLAMA, **GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA, **GROUPED, use_sliding_window=True, max_window_layers=1)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**LLAMA, **GROUPED, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    ),
}


def requests(**settings):
    return [Request(prompt, seed=seed, **settings) for seed, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_greedy_is_generate_beyond_the_window_and_the_first_cache(model, tokenizer, monkeypatch, rows):
    monkeypatch.setattr("nanochat_hf.generation.continuous.BLOCK", 3)  # so that the cache grows often
    engine = Continuous(model, tokenizer, None, rows=rows, length=80)
    out = engine.run(requests(max_new_tokens=40))
    assert [c.ids for (c,) in out] == [reference(model, tokenizer, p, 40) for p in PROMPTS]
    assert engine.run(requests(max_new_tokens=40)) == out, "what earlier rows left behind is not seen"


@pytest.mark.parametrize("rows", [1, 2, 12])
@pytest.mark.parametrize("settings", [{}, SAMPLED])
def test_a_sample_is_the_engines_whatever_row_it_runs_in(model, tokenizer, rows, settings):
    settings = settings | dict(max_new_tokens=10 if rows == 1 else 20)
    expected = Engine(model, tokenizer).generate(PROMPTS, seed=list(range(4)), **settings)
    engine = Continuous(model, tokenizer, rows=rows, length=80)
    assert engine.run(requests(**settings)) == expected
    assert rows == 1 or engine.run(requests(**settings)[::-1]) == expected[::-1]
    if len(settings) > 1:
        assert len({tuple(c.ids) for row in expected for c in row}) > 4, "samples differ"


def test_rows_that_draw_in_different_ways_share_a_batch(model, tokenizer):
    ways = [{}, SAMPLED, dict(temperature=0.7), dict(temperature=1.3, top_k=5)]
    mixed = [Request(p, max_new_tokens=12, seed=9, **way) for p, way in zip(PROMPTS, ways, strict=True)]
    together = Continuous(model, tokenizer, rows=8, length=64).run(mixed)
    assert together == [Continuous(model, tokenizer, rows=1, length=64).run([one])[0] for one in mixed]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_models_give_the_tokens_of_generate_past_their_windows(tokenizer, name, attention):
    model = shaken(OTHERS[name])
    model.set_attn_implementation(attention)
    out = Continuous(model, tokenizer, None, rows=3, length=60).run(requests(max_new_tokens=16))
    assert [c.ids for (c,) in out] == [reference(model, tokenizer, p, 16) for p in PROMPTS]


def test_models_that_cannot_share_rows_are_refused(model, tokenizer):
    bloom = BloomForCausalLM(BloomConfig(vocab_size=280, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="bloom cannot be decoded in rows with lengths of their own.*use Engine"):
        Continuous(bloom, tokenizer, length=64)
    model.set_attn_implementation("flex_attention")
    try:
        with pytest.raises(ValueError, match="need attention sdpa or eager, the model has flex_attention"):
            Continuous(model, tokenizer)
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("limit", [9, 40])
@pytest.mark.parametrize("settings", [{}, dict(temperature=1.0)])
def test_tools_answer_within_their_rows(model, tokenizer, monkeypatch, limit, settings):
    calling(model, tokenizer, monkeypatch)
    expected = Engine(model, tokenizer).generate(PROMPTS, max_new_tokens=limit, seed=list(range(4)), **settings)
    assert limit < 20 or sum("<|output_start|>12<|output_end|>" in c.text for row in expected for c in row) >= 2
    assert Continuous(model, tokenizer, rows=3, length=100).run(requests(max_new_tokens=limit, **settings)) == expected
    silent = requests(max_new_tokens=limit, calculate=False, **settings)
    assert not any(any(c.forced) for row in Continuous(model, tokenizer, rows=3, length=100).run(silent) for c in row)


def test_compiled_steps_and_several_between_two_looks_give_the_same(tokenizer, traced, monkeypatch):
    monkeypatch.setattr("nanochat_hf.generation.continuous.HALVINGS", 1)
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32)
    model = shaken(lambda: NanochatForCausalLM(NanochatConfig(vocab_size=280, **sizes)))
    way = dict(temperature=1.0, num_samples=2, log_probs=True)
    asked = [Request(p, seed=i, max_new_tokens=20 - 5 * i, **way) for i, p in enumerate(PROMPTS)]
    expected = Continuous(model, tokenizer, rows=8, length=64).run(asked)
    engine = Continuous(model, tokenizer, rows=4, length=64, compile=True)
    shapes = []
    run = engine.table.run
    engine.table.run = lambda rows, *rest, **more: shapes.append(rows) or run(rows, *rest, **more)
    for engine.steps in (1, 3, 8):
        for mine, theirs in zip(engine.run(asked), expected, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert (a.ids, a.end, a.forced) == (b.ids, b.end, b.forced)
                assert a.log_probs == pytest.approx(b.log_probs, abs=1e-4)
    assert set(shapes) == {4, 2}, "fewer rows run in the tail"


@pytest.mark.parametrize("steps", [3, 8])
def test_a_row_that_waits_for_its_tool_reads_the_same_token_again(model, tokenizer, monkeypatch, steps):
    calling(model, tokenizer, monkeypatch)
    settings = dict(max_new_tokens=50, temperature=1.0)
    expected = Engine(model, tokenizer).generate(PROMPTS, seed=list(range(4)), **settings)
    assert sum(c.text.count("<|output_start|>12") for (c,) in expected) >= 3
    engine = Continuous(model, tokenizer, rows=3, length=100)
    engine.steps = steps
    assert engine.run(requests(**settings)) == expected


def ended(model, tokenizer, **settings):
    """An engine for which tokens that greedy answers hold early are end tokens, and those answers up to there."""
    plain = Continuous(model, tokenizer, None, rows=4, length=80).run(requests(max_new_tokens=12))
    late = plain[0][0].ids[4]
    engine = Continuous(model, tokenizer, None, length=80, **settings)
    engine.specials = (engine.specials[0], frozenset([late]))
    engine.table.ends = torch.tensor([late])
    return engine, plain, late


def test_a_row_that_ends_makes_room_for_the_next_request(model, tokenizer, monkeypatch):
    engine, plain, late = ended(model, tokenizer, rows=2)
    started = []
    put = RowCache.put
    monkeypatch.setattr(RowCache, "put", lambda *a: started.append((a[1], steps)) or put(*a))
    handles = [engine.submit(request) for request in requests(max_new_tokens=12)]
    steps, done = 0, {}
    assert (engine.running, engine.queued, engine.idle) == (0, 4, False)
    while not engine.idle:
        events = engine.step()
        steps += 1
        assert len(events) <= 2 and all(event.ids or event.done for event in events)
        done |= {event.handle: event.completion for event in events if event.done}
    for handle, (before,) in zip(handles, plain, strict=True):
        stop = before.ids.index(late) if late in before.ids else 12
        after = done[handle]
        assert after.ids == before.ids[:stop]
        assert (after.finished, after.end) == ((True, late) if stop < 12 else (False, None))
    assert len(started) == 4 and started[0][1] == started[1][1] == 0
    assert started[2][1] == 1 + min(len(done[h].ids) for h in handles[:2]), "the third began as soon as one had ended"
    engine.submitted = 0
    first, started[:] = list(started), []
    for request in requests(max_new_tokens=12):
        engine.submit(request)
    steps = 0
    while not engine.idle:
        engine.step()
        steps += 1
    assert started == first, "the same requests take the same rows at the same steps"


def test_a_prompt_is_read_once_whatever_its_samples_and_rows(model, tokenizer, monkeypatch):
    shapes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **k: shapes.append(tuple(k["input_ids"].shape)) or forward(**k))
    engine = Continuous(model, tokenizer, rows=2, length=64)
    engine.run([Request([1, 2, 3], max_new_tokens=3, temperature=1.0, num_samples=5)])
    assert [shape for shape in shapes if shape[1] > 1] == [(1, 2)] and max(shape[0] for shape in shapes) == 2
    shapes.clear()
    engine.prefill = 60
    engine.run(requests(max_new_tokens=2))
    assert [shape for shape in shapes if shape[1] > 1] == [(2, 3), (2, 29)], "in queue order, as many as a pass takes"


def test_cancelling_frees_rows_and_the_queue(model, tokenizer):
    expected = Continuous(model, tokenizer, rows=4, length=80).run(requests(max_new_tokens=12, **SAMPLED))
    engine = Continuous(model, tokenizer, rows=2, length=80)
    first, second, third, fourth = [engine.submit(r) for r in requests(max_new_tokens=12, **SAMPLED)]
    engine.step()
    engine.cancel(first)
    engine.cancel(third, 1)
    engine.cancel(99)
    assert engine.running == 0 and engine.queued == 3 + 2 + 3
    done, order = {}, []
    while not engine.idle:
        for event in engine.step():
            order.append((event.handle, event.sample))
            if event.done:
                done[event.handle, event.sample] = event.completion
    rest = [(second, 0), (second, 1), (second, 2), (third, 0), (third, 2), *((fourth, j) for j in range(3))]
    assert sorted(done) == rest
    assert set(order) == set(done), "no event follows"
    assert all(completion == expected[handle - first][sample] for (handle, sample), completion in done.items())
    engine.submit(requests(max_new_tokens=2)[0])
    engine.clear()
    assert engine.idle and engine.step() == []


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_log_probs_are_those_of_the_full_softmax_end_token_included(model, tokenizer, monkeypatch, temperature):
    calling(model, tokenizer, monkeypatch)
    settings = dict(max_new_tokens=20, temperature=temperature, log_probs=True, top=3)
    engine = Continuous(model, tokenizer, rows=3, length=100)
    for prompt, (completion,) in zip(PROMPTS, engine.run(requests(**settings)), strict=True):
        said = [*completion.ids, *([completion.end] if completion.finished else [])]
        forced = [*completion.forced, *([False] if completion.finished else [])]
        # not in one pass: `calling` looks at each token that is fed
        logits = torch.cat(
            [model(input_ids=torch.tensor([[*prompt, *said[:i]]])).logits[:, -1] for i in range(len(said))]
        )
        scores = (logits / (temperature or 1)).log_softmax(-1)
        own = scores.gather(1, torch.tensor(said)[:, None])[:, 0].masked_fill(torch.tensor(forced), 0)
        assert len(completion.log_probs) == len(completion.top) == len(said)
        assert completion.log_probs == pytest.approx(own.tolist(), abs=1e-4)
        for place, top in enumerate(completion.top):
            values, ids = scores[place].topk(3)
            assert top == [] if forced[place] else [i for i, _ in top] == ids.tolist()
            assert [v for _, v in top] == pytest.approx([] if forced[place] else values.tolist(), abs=1e-4)


def test_streamed_events_add_up(model, tokenizer):
    engine, ids, places = Continuous(model, tokenizer, rows=3, length=80), {}, {}
    handles = [engine.submit(request) for request in requests(max_new_tokens=10, **SAMPLED)]
    while not engine.idle:
        for event in engine.step():
            key = event.handle, event.sample
            assert event.start == len(ids.setdefault(key, []))
            ids[key] += event.ids
            places[key] = event.completion
    assert all(places[key].ids == ids[key] for key in ids) and len(ids) == 12
    expected = Continuous(model, tokenizer, rows=3, length=80).run(requests(max_new_tokens=10, **SAMPLED))
    assert [[ids[h, j] for j in range(3)] for h in handles] == [[c.ids for c in row] for row in expected]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(prompt=[]), "non-empty list of ids"),
        (dict(prompt=[1], max_new_tokens=0), "max_new_tokens=0"),
        (dict(prompt=[1], num_samples=0), "num_samples=0"),
        (dict(prompt=[1], temperature=-1.0), "temperature=-1.0"),
        (dict(prompt=[1], top=-1), "top=-1"),
        (dict(prompt=[1] * 30, max_new_tokens=3), "30 tokens and max_new_tokens=3 need 33 positions, a row has 32"),
    ],
)
def test_requests_that_cannot_be_are_named(model, tokenizer, settings, reason):
    engine = Continuous(model, tokenizer)  # as long as the model's positions
    with pytest.raises(ValueError, match=reason):
        engine.submit(Request(**settings))
    assert engine.idle


def test_run_needs_the_engine_for_itself_and_an_engine_needs_rows(model, tokenizer):
    engine = Continuous(model, tokenizer)
    engine.submit(Request([1], max_new_tokens=2))
    with pytest.raises(ValueError, match="use submit and step"):
        engine.run([])
    with pytest.raises(ValueError, match="rows=0"):
        Continuous(model, tokenizer, rows=0)


@pytest.mark.slow
def test_compiled_code_gives_the_same(model, tokenizer):
    expected = Continuous(model, tokenizer, rows=4, length=64).run(requests(max_new_tokens=24))
    assert Continuous(model, tokenizer, rows=4, length=64, compile=True).run(requests(max_new_tokens=24)) == expected
