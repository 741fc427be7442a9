"""What nanochat got after February 2026, as config fields: where smear stops, what it remembers, and how all begins."""

import json
import math

import pytest
import torch
from transformers import DynamicCache, StaticCache

from nanochat_hf.kernels import dispatch
from nanochat_hf.model import NanochatConfig, NanochatForCausalLM
from nanochat_hf.model.configuration_nanochat_hf import short_window
from nanochat_hf.model.smear_nanochat_hf import follows
from tests.support.models import LATER, SIZES, build, tokens


@pytest.fixture(scope="module")
def model():
    return build(**LATER)


def test_each_part_changes_the_logits(model):
    ids = tokens(1, 16)
    whole = model(ids).logits
    with torch.no_grad():
        for parameter in (model.model.smear.strength, model.model.backout_lambda):
            before = parameter.clone()
            parameter.zero_()
            assert not torch.allclose(model(ids).logits, whole)
            parameter.copy_(before)
    for name, value in (("value_gate_scale", 2.0), ("qk_scale", 1.0)):
        other = build(**LATER | {name: value})
        assert not torch.allclose(other(ids).logits, whole), name


def test_smear_takes_the_neighbour_through_its_gate(model):
    inner, x = model.model.smear, torch.randn(2, 5, 64)
    made = inner(x, None, follows(torch.arange(5)[None], None, 2))
    gate = 1 / (1 + (-(x[..., :24] @ inner.gate.weight[0])).exp())
    assert torch.equal(made[:, 0], x[:, 0])
    for t in range(1, 5):
        torch.testing.assert_close(made[:, t], x[:, t] + inner.strength * gate[:, t, None] * x[:, t - 1])


def test_packed_documents_do_not_smear_into_each_other(model):
    first, second = tokens(1, 7, 1), tokens(1, 9, 2)
    packed = torch.cat((first, second), 1)
    alone = torch.cat([model(ids, use_cache=False).logits for ids in (first, second)], 1)
    places = torch.cat((torch.arange(7), torch.arange(9)))[None]
    torch.testing.assert_close(model(packed, position_ids=places).logits, alone, rtol=1e-4, atol=1e-5)
    # without positions they are one document, and as in nanochat the first token of the second takes its neighbour
    one = model.model.embed_tokens(packed)
    assert follows(torch.arange(16)[None], None, 1)[0, 7] and not follows(places, None, 1)[0, 7]
    assert not torch.allclose(model(packed).logits[:, 7], alone[:, 7]) and one.shape == (1, 16, 64)


def test_borders_stop_smear_where_no_positions_are_given():
    borders = torch.tensor([0, 3, 4, 7, 8], dtype=torch.int32)
    found = follows(torch.arange(4)[None], None, 2, borders)
    assert found.tolist() == [[False, True, True, False], [False, True, True, False]]


def test_padding_on_the_left_is_no_neighbour_with_and_without_positions():
    model = build(**LATER, rope_in_bfloat16=False)  # rounded angles would depend on the padding where no positions are
    ids = tokens(1, 9)
    padded = torch.cat((torch.full((1, 4), 3), ids), 1)
    mask = (torch.arange(13) >= 4).long()[None]
    alone = model(ids).logits
    for places in (None, (mask.cumsum(-1) - 1).clamp(min=0)):
        found = model(padded, attention_mask=mask, position_ids=places).logits[:, 4:]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "windowed", "static"])
def test_every_cache_remembers_the_token_before(model, kind):
    ids = tokens(2, 24)
    whole = model(ids, use_cache=False).logits
    cache = {
        "dynamic": lambda: DynamicCache(),
        "windowed": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=32),
    }[kind]()
    parts = [model(part, past_key_values=cache).logits for part in ids.split([5, 1, 6, 1, 1, 10], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 24 and len(cache.layers) == 5


def test_a_caller_may_remember_the_tokens_instead_of_the_cache(model):
    ids = tokens(2, 10)
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :6], past_key_values=cache, previous_ids=ids[:, :1]).logits  # position 0 has no neighbour
    rest = model(ids[:, 6:], past_key_values=cache, previous_ids=ids[:, 5:6]).logits
    assert len(cache.layers) == 4
    torch.testing.assert_close(torch.cat((first, rest), 1), model(ids).logits, rtol=1e-4, atol=1e-5)


def test_what_cannot_know_the_token_before_is_refused(model):
    cache = DynamicCache(config=model.config)
    build()(tokens(1, 4), past_key_values=cache)  # a model without smear remembers no tokens
    with pytest.raises(ValueError, match="holds 4 positions but not their tokens.*give previous_ids"):
        model(tokens(1, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="inputs_embeds cannot replace input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 64))
    without = build(smear=True, use_value_embeddings=False)
    with pytest.raises(ValueError, match="the token before is looked up by id"):
        without(inputs_embeds=torch.zeros(1, 2, 64))
    with pytest.raises(ValueError, match="continuous batching over pages does not give the token before"):
        model(tokens(1, 2), cache=object())
    model.config._attn_implementation = "paged|eager"
    try:
        with pytest.raises(ValueError, match="continuous batching over pages"):
            model(tokens(1, 2))
    finally:
        model.config._attn_implementation = "sdpa"


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    ids, runs = tokens(2, 16), []
    for checkpointing in (False, True):
        model = build(**LATER).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=ids).loss.backward()
        runs.append({name: p.grad for name, p in model.named_parameters()})
    assert runs[0].keys() == runs[1].keys() and all(grad is not None and grad.any() for grad in runs[0].values())
    for name, grad in runs[0].items():
        torch.testing.assert_close(grad, runs[1][name], rtol=1e-4, atol=1e-6)


def test_training_is_one_graph_and_stays_in_half_precision():
    model = build(**LATER).train()
    ids, places = tokens(2, 16), torch.arange(8).repeat(2)[None].expand(2, -1)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    expected = model(ids, position_ids=places, labels=ids).loss
    torch.testing.assert_close(compiled(ids, position_ids=places, labels=ids).loss, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(ids, output_hidden_states=True).hidden_states
    assert {h.dtype for h in hidden} == {torch.bfloat16}
    half = build(**LATER).to(torch.bfloat16)
    assert half(ids).logits.isfinite().all()


def test_scalars_stay_float32_and_all_survives_saving(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = NanochatForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens(1, 20)).logits, model(tokens(1, 20)).logits)
    half = NanochatForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).model
    assert half.smear.strength.dtype == half.backout_lambda.dtype == torch.float32
    assert half.smear.gate.weight.dtype == torch.bfloat16


def test_a_folder_from_before_the_fields_computes_the_same(tmp_path):
    before = build()
    before.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    fields = {"window_rule", "qk_scale", "value_gate_channels", "value_gate_scale", "smear", "backout", "embedding_std"}
    fields |= {"mlp_init_scale", "value_gate_init"}
    fields |= {f"{name}_lambda_{end}" for name in ("resid", "x0") for end in ("first", "last")}
    assert fields <= config.keys()
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in fields}))
    after = NanochatForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(after(tokens(2, 20)).logits, before(tokens(2, 20)).logits)


def test_initial_weights_follow_the_fields():
    torch.manual_seed(0)
    start = dict(embedding_std=0.8, mlp_init_scale=0.4, value_gate_init=0.02)
    ramps = dict(resid_lambda_first=1.15, resid_lambda_last=1.05, x0_lambda_first=0.20, x0_lambda_last=0.05)
    sizes = SIZES | dict(vocab_size=1000, hidden_size=128)
    model = NanochatForCausalLM(NanochatConfig(**sizes, **LATER, **start, **ramps)).model
    bound = math.sqrt(3 / 128)
    assert abs(model.embed_tokens.weight.std() - 0.8) < 0.02
    for layer in model.layers:
        assert 0.39 * bound < layer.mlp.up_proj.weight.abs().max() <= 0.4 * bound
        assert 0.99 * bound < layer.self_attn.q_proj.weight.abs().max() <= bound
    gates = torch.stack([layer.self_attn.ve_gate.weight for layer in model.layers[1::2]])
    assert gates.shape == (2, 2, 12) and gates.min() >= 0 and 0.015 < gates.max() <= 0.02
    assert model.smear.gate.weight.min() >= 0 and 0.01 < model.smear.gate.weight.max() <= 0.02
    assert model.smear.strength.item() == 0 and model.backout_lambda.item() == pytest.approx(0.2)
    for i in range(4):
        assert model.resid_lambdas[i].item() == pytest.approx(1.15 - 0.10 * i / 3)
        assert model.x0_lambdas[i].item() == pytest.approx(0.20 - 0.15 * i / 3)


def test_windows_follow_their_rule():
    for positions in (128, 384, 385, 1000, 2048, 4096):
        assert short_window(positions, "half") == positions // 2 + 1
        assert short_window(positions, "third") == min(128 * math.ceil(positions / 384) + 1, positions)
        assert short_window(positions, "quarter") == min(128 * math.ceil(positions / 512) + 1, positions)
    assert NanochatConfig(window_rule="quarter").sliding_window == 513
    assert NanochatConfig(window_rule="quarter", sliding_window=300).sliding_window == 300


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(window_rule="fifth"), "window_rule=fifth is unknown; choose from half, third, quarter"),
        (dict(value_gate_channels=65), "hidden_size=64 must be at least 65"),
        (dict(smear=True, hidden_size=16, use_value_embeddings=False), "hidden_size=16 must be at least 24"),
        (dict(value_gate_init=-0.1), "value_gate_init=-0.1"),
        (dict(qk_scale=0.0), "qk_scale=0.0 must be positive"),
    ],
)
def test_impossible_settings_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        NanochatConfig(**SIZES | changes)


def test_no_kernel_computes_less_than_the_fields_say():
    """Kernels get what the fields change as arguments; smear and backout stand outside of all operations."""
    plain, _ = dispatch.choose(build(), torch.device("cpu"), torch.float32)
    later, _ = dispatch.choose(build(**LATER), torch.device("cpu"), torch.float32)
    assert plain == later
    attention = build(**LATER).model.layers[0].self_attn
    assert attention.scaling == pytest.approx(1.2**2 / 16**0.5) and build().model.layers[1].channels == 32
    assert build(**LATER).model.layers[1].channels == 12
