"""The GPT against a plain implementation of its formulas, and the properties that training and generation lean on."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_hf.model import NanochatConfig, NanochatForCausalLM
from nanochat_hf.model import modeling_nanochat_hf as modeling
from tests.support.models import SIZES, build, tokens


@pytest.fixture(scope="module")
def model():
    return build()


def unit(vector):
    return vector / (vector.square().mean() + torch.finfo(vector.dtype).eps).sqrt()


def turned(vector, position, theta):
    """Pairs (i, i + D/2) turned by −position·frequency, table entries rounded to bfloat16."""
    half = len(vector) // 2
    out = torch.empty_like(vector)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(vector))
        cos, sin = torch.tensor([math.cos(angle), math.sin(angle)]).bfloat16().float()
        out[i] = vector[i] * cos + vector[half + i] * sin
        out[half + i] = vector[half + i] * cos - vector[i] * sin
    return out


def plain(model, ids):
    """Logits (T, V) of one sequence by loops over positions, heads and keys; only the weights are shared, by name."""
    c, w = model.config, {name: value.detach() for name, value in model.state_dict().items()}
    D, H, K = c.head_dim, c.num_attention_heads, c.num_key_value_heads
    start = [unit(w["model.embed_tokens.weight"][t]) for t in ids]
    stream = list(start)
    for i in range(c.num_hidden_layers):
        layer = f"model.layers.{i}."
        pattern = c.window_pattern[i % len(c.window_pattern)]
        reach = c.max_position_embeddings // 2 if pattern == "S" and i < c.num_hidden_layers - 1 else len(ids)
        queries, keys, values = [], [], []
        stream = [
            w["model.resid_lambdas"][i] * x + w["model.x0_lambdas"][i] * x0 for x, x0 in zip(stream, start, strict=True)
        ]
        for position, x in enumerate(stream):
            y = unit(x)
            q, k, v = ((w[f"{layer}self_attn.{n}_proj.weight"] @ y).split(D) for n in "qkv")
            if i % 2 == (c.num_hidden_layers - 1) % 2:
                gate = 2 / (1 + (-(w[layer + "self_attn.ve_gate.weight"] @ y[:32])).exp())
                extra = w[f"model.value_embeds.{i}.weight"][ids[position]].split(D)
                v = [v[h] + gate[h] * extra[h] for h in range(K)]
            queries.append([unit(turned(h, position, c.rope_theta)) for h in q])
            keys.append([unit(turned(h, position, c.rope_theta)) for h in k])
            values.append(v)
        for t in range(len(ids)):
            heads = []
            for h in range(H):
                seen, own = range(max(0, t - reach), t + 1), h // (H // K)
                weights = torch.stack([queries[t][h] @ keys[s][own] / D**0.5 for s in seen]).exp()
                heads.append(sum(a * values[s][own] for a, s in zip(weights / weights.sum(), seen, strict=True)))
            x = stream[t] + w[layer + "self_attn.o_proj.weight"] @ torch.cat(heads)
            up = w[layer + "mlp.up_proj.weight"] @ unit(x)
            stream[t] = x + w[layer + "mlp.down_proj.weight"] @ torch.where(up > 0, up * up, 0)
    logits = torch.stack([w["lm_head.weight"][: c.vocab_size] @ unit(x) for x in stream])
    return 15 * torch.tanh(logits / 15)


@pytest.mark.parametrize("pattern", ["SSSL", "L", "S"])
@pytest.mark.parametrize("depth", [3, 4])
def test_logits_are_those_of_the_formulas(pattern, depth):
    model, ids = build(window_pattern=pattern, num_hidden_layers=depth), tokens(1, 16)
    expected = plain(model, ids[0].tolist())
    for kernel in ("sdpa", "eager"):
        model.set_attn_implementation(kernel)
        torch.testing.assert_close(model(ids).logits[0], expected, rtol=1e-5, atol=1e-5)  # logits reach 4


def test_initial_weights_follow_the_table():
    torch.manual_seed(0)
    model = NanochatForCausalLM(NanochatConfig(**(SIZES | dict(vocab_size=1000, hidden_size=128))))
    bound = math.sqrt(3 / 128)
    for name, p in model.named_parameters():
        if name == "model.embed_tokens.weight":
            assert p.shape == (1024, 128) and abs(p.std() - 1) < 0.02 and abs(p.mean()) < 0.02
        elif name == "lm_head.weight":
            assert p.shape == (1024, 128) and abs(p.std() / 0.001 - 1) < 0.02
        elif "lambdas" in name:
            assert (p == (1.0 if "resid" in name else torch.tensor(0.1))).all()
        elif any(zero in name for zero in ("o_proj", "down_proj", "ve_gate")):
            assert not p.any()
        else:
            assert 0.99 * bound < p.abs().max() <= bound and abs(p.std() * 128**0.5 - 1) < 0.03, name
    assert set(model.model.value_embeds) == {"1", "3"}
    assert not [name for name, _ in model.named_parameters() if "bias" in name]


@settings(max_examples=15, deadline=None)
@given(place=st.integers(0, 29), seed=st.integers(0, 999))
def test_no_position_sees_the_future(model, place, seed):
    ids = tokens(1, 30, seed)
    changed = ids.clone()
    changed[0, place] = 4 + (ids[0, place] - 3) % 96
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :place], after[:, :place], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, place], after[:, place])


@settings(max_examples=10, deadline=None)
@given(place=st.integers(0, 20))
def test_a_window_reaches_itself_and_half_the_sequence_back(place):
    one = build(num_hidden_layers=1, layer_types=["sliding_attention"])  # N = 16 // 2 = 8 positions before its own
    ids = tokens(1, 32)
    changed = ids.clone()
    changed[0, place] = 4 + (ids[0, place] - 3) % 96
    moved = (one(ids).logits - one(changed).logits)[0].abs().amax(-1) > 1e-6
    assert moved.nonzero().flatten().tolist() == list(range(place, min(32, place + 9)))


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(1, 39))
def test_cached_equals_uncached_beyond_window_and_training_length(model, cut):
    ids = tokens(2, 40)
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :cut], use_cache=True)
    rest = [model(ids[:, i : i + 1], past_key_values=first.past_key_values).logits for i in range(cut, 40)]
    torch.testing.assert_close(torch.cat([first.logits, *rest], 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_left_padded_generation_equals_each_prompt_alone(kernel):
    model = build(attn_implementation=kernel)
    prompts = [tokens(1, n, n)[0].tolist() for n in (3, 12, 20)]
    ids = torch.tensor([[3] * (20 - len(p)) + p for p in prompts])
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    together = model.generate(ids, attention_mask=(ids != 3).long(), **options)[:, 20:]
    for prompt, row in zip(prompts, together, strict=True):
        alone = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(), **options)
        assert alone[0, len(prompt) :].tolist() == row.tolist()
    assert model(ids, attention_mask=(ids != 3).long()).logits.isfinite().all()


def test_beam_search_and_static_cache_run_over_the_same_model(model):
    ids = tokens(2, 10)
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None)
    greedy = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **options), greedy)
    assert torch.equal(model.generate(ids, use_cache=False, **options), greedy)
    assert model.generate(ids, num_beams=2, **options).shape == (2, 18)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [None, True, False])
def test_packed_documents_are_isolated_and_running_positions_are_not(kernel, use_cache):
    model, ids = build(attn_implementation=kernel), tokens(2, 30)
    positions = torch.stack([torch.tensor([*range(11), *range(19)]), torch.tensor([*range(5), *range(20), *range(5)])])
    packed = model(ids, position_ids=positions, use_cache=use_cache).logits
    for row, borders in enumerate(((0, 11, 30), (0, 5, 25, 30))):
        for start, end in pairwise(borders):
            alone = model(ids[row : row + 1, start:end]).logits[0]
            torch.testing.assert_close(packed[row, start:end], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(ids).logits[0, 11:], packed[0, 11:], atol=1e-3)


def test_loss_counts_weights_and_items_as_defined(model, monkeypatch):
    ids, weights = tokens(2, 24), torch.rand(2, 24)
    labels = ids.masked_fill(torch.rand(2, 24) < 0.3, -100)
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)
    logits, valid = model(ids).logits, shifted != -100
    nll = -logits.log_softmax(-1).gather(-1, shifted.clamp(min=0)[..., None])[..., 0] * valid
    training = build().train()
    for chunk in (4096, 7):  # 48 targets: whole, and in pieces that do not divide them
        monkeypatch.setattr(modeling, "LOSS_CHUNK", chunk)
        for case in (model, training):
            torch.testing.assert_close(case(ids, labels=labels).loss, nll.sum() / valid.sum())
            torch.testing.assert_close(case(ids, shift_labels=shifted, num_items_in_batch=100).loss, nll.sum() / 100)
            torch.testing.assert_close(
                case(ids, shift_labels=shifted, loss_weights=weights).loss, (nll * weights).sum() / valid.sum()
            )
    assert training(ids, labels=labels).logits is None and model(ids, labels=labels).logits.dtype == torch.float32
    empty = training(ids, labels=torch.full_like(ids, -100)).loss
    empty.backward()
    assert empty == 0 and all(p.grad is None or not p.grad.any() for p in training.parameters())


class AdaptedHead(torch.nn.Linear):
    """Stands for a head that an adapter has replaced: the loss must call it, not read its weight."""


@pytest.mark.parametrize("adapted", [False, True])
def test_chunked_loss_has_the_whole_gradient_and_never_all_logits(monkeypatch, adapted):
    ids = tokens(2, 24)
    model = build().train()
    if adapted:
        model.lm_head.__class__ = AdaptedHead
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    hidden = model.model(ids).last_hidden_state
    F.cross_entropy(model.logits(hidden).flatten(0, 1), shifted.flatten()).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(modeling, "LOSS_CHUNK", 10)
    widest = []
    monkeypatch.setattr(model, "logits", lambda h: (widest.append(len(h)), NanochatForCausalLM.logits(model, h))[1])
    saved = []  # what forward keeps for backward
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.shape), t)[1], lambda t: t):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert (
        max(widest, default=0) == (10 if adapted else 0) and saved and not any(shape[-1:] == (100,) for shape in saved)
    )
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_loss_under_bfloat16_autocast_is_float32_and_near():
    ids, model = tokens(2, 24), build().train()
    whole = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(ids, labels=ids).loss
    low.backward()
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, whole, rtol=2e-3, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant, use_cache):
    ids, model = tokens(2, 24), build().train()

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=use_cache).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    before = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls, mlp = [], model.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for a, b in zip(before, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert len(calls) == 2, "the layer was not recomputed"


def test_one_graph_without_breaks_for_training_packed_rows():
    model, ids = build().train(), tokens(2, 24)
    positions = torch.tensor([*range(11), *range(13)]).repeat(2, 1)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    for seed in (1, 2):  # other borders, same graph
        positions = positions.roll(seed, -1) if seed == 1 else torch.arange(24).repeat(2, 1)
        loss = compiled(input_ids=ids, position_ids=positions, shift_labels=ids).loss
        torch.testing.assert_close(loss, model(ids, position_ids=positions, shift_labels=ids).loss)
    loss.backward()


def test_outputs_keep_transformers_conventions(model):
    ids = tokens(2, 12)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 5 and torch.equal(out.hidden_states[-1], model.model(ids).last_hidden_state)
    assert out.logits.shape == (2, 12, 100) and out.logits.abs().max() <= 15
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, out.logits[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, out.logits[:, [0, 5]])
    assert model.get_input_embeddings() is model.model.embed_tokens and model.get_output_embeddings() is model.lm_head
    with pytest.raises(ValueError, match="inputs_embeds cannot replace input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 64))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(hidden_size=65), "hidden_size=65"),
        (dict(num_key_value_heads=3), "num_key_value_heads=3"),
        (dict(head_dim=15), "head_dim=15"),
        (dict(window_pattern="SXL"), "window_pattern='SXL'"),
        (dict(window_pattern=""), "window_pattern=''"),
        (dict(sliding_window=17), "sliding_window=17"),
        (dict(hidden_size=16), "hidden_size=16"),
        (dict(num_hidden_layers=0), "num_hidden_layers=0"),
        (dict(num_key_value_heads=0), "num_key_value_heads=0"),
        (dict(num_attention_heads=0), "num_attention_heads=0"),
        (dict(vocab_size=-1), "vocab_size=-1"),
        (dict(final_logit_softcapping=None), "final_logit_softcapping=None"),
        (dict(layer_types=["full_attention"]), "layer_types="),
        (dict(layer_types=["chunked_attention"] * 4), "layer_types="),
        (dict(tie_word_embeddings=True), "tie_word_embeddings=True"),
        (dict(window_pattern=None), "window_pattern='NONE'"),
        (dict(pad_vocab_to_multiple_of=0), "pad_vocab_to_multiple_of=0"),
        (dict(rms_norm_eps=-1.0), "rms_norm_eps=-1.0"),
        (dict(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "rope_type=yarn"),
        (dict(rope_scaling={"type": "linear"}), "rope_type=linear"),
        (dict(model_type="nanochat"), "model_type=nanochat"),
    ],
)
def test_impossible_sizes_are_named(changes, named):
    with pytest.raises(ValueError) as error:
        NanochatConfig(**(SIZES | changes))
    assert named in str(error.value) and "\n" not in str(error.value)


def test_what_transformers_writes_about_rope_is_understood():
    assert NanochatConfig(**SIZES).rope_theta == 10000.0 and NanochatConfig(**SIZES, rope_theta=5e5).rope_theta == 5e5
    assert NanochatConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500.0}).rope_theta == 500.0
    # gates read 32 channels of the width; without value embeddings there are none
    assert NanochatConfig(**SIZES | dict(hidden_size=16), use_value_embeddings=False).hidden_size == 16
