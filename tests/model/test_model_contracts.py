"""What transformers asks of a causal language model: loading, resizing, outputs, attention. See docs/model.md."""

import json
from itertools import pairwise

import accelerate
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import find_labels

from nanochat_hf.model import NanochatConfig, NanochatForCausalLM
from tests.support.models import build, tokens

VARIATIONS = {
    "windows and value embeddings": {},
    "odd depth": dict(num_hidden_layers=3),
    "no value embeddings": dict(
        use_value_embeddings=False, window_pattern="L", rms_norm_eps=1e-6, rope_in_bfloat16=False
    ),
    "one key head": dict(num_key_value_heads=1),
    "no padding": dict(pad_vocab_to_multiple_of=1),
    "wide heads": dict(head_dim=32, intermediate_size=37),
}


@pytest.fixture(params=VARIATIONS.values(), ids=VARIATIONS)
def varied(request):
    return build(**request.param)


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Saving and loading


def test_every_variation_survives_saving_whole_and_in_shards(varied, tmp_path):
    ids = tokens(2, 20)
    expected = varied(ids).logits
    varied.save_pretrained(tmp_path / "whole")
    varied.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    for folder in ("whole", "shards"):
        for options in (
            {},
            {"low_cpu_mem_usage": True},
            {"device_map": "cpu"},
            {"device_map": "auto"},
            {"tie_word_embeddings": False},
        ):
            model, info = NanochatForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True, **options)
            assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
            assert torch.equal(model(ids).logits, expected), (folder, options)
    json_config = NanochatConfig.from_json_file(tmp_path / "whole" / "config.json")
    assert json_config.to_dict() == NanochatConfig.from_dict(json_config.to_dict()).to_dict()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_in_half_precision_says_so_and_works(dtype, tmp_path):
    build().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    wanted, ids = getattr(torch, dtype), tokens(2, 20)
    assert model.dtype == model.model.dtype == wanted and model.config.dtype == wanted
    out = model(ids, use_cache=True)
    assert {layer.keys.dtype for layer in out.past_key_values.layers} == {wanted} and out.logits.isfinite().all()
    assert model.generate(ids, max_new_tokens=20, do_sample=False, cache_implementation="static").shape == (2, 40)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto").dtype == wanted
    assert AutoModel.from_pretrained(tmp_path / "again").dtype == wanted
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_weights_may_lie_elsewhere_between_uses(tmp_path):
    ids = tokens(2, 20)
    expected = build()(ids).logits
    assert torch.equal(accelerate.cpu_offload(build(), execution_device="cpu")(ids).logits, expected)
    assert torch.equal(accelerate.disk_offload(build(), tmp_path, execution_device="cpu")(ids).logits, expected)


# Resizing


def test_resizing_reaches_every_table_and_keeps_the_old_rows(varied, tmp_path):
    ids = tokens(2, 20).clamp(max=69)
    before, old = varied(ids).logits, {n: p.clone() for n, p in varied.state_dict().items()}
    for size, options in ((150, {}), (70, {}), (90, {"mean_resizing": False}), (100, {"pad_to_multiple_of": 16})):
        embedding = varied.resize_token_embeddings(size, **options)
        rows = -(-size // 16) * 16 if options.get("pad_to_multiple_of") else size
        assert (
            embedding is varied.get_input_embeddings()
            and varied.config.vocab_size == rows
            and embedding.num_embeddings == rows
        )
        tables = {n: p for n, p in varied.state_dict().items() if "embed" in n or "lm_head" in n}
        assert {len(p) for p in tables.values()} == {rows} and varied.lm_head.out_features == rows
        assert all(torch.equal(p[:70], old[n][:70]) for n, p in tables.items())
        logits = varied(ids).logits
        assert logits.shape == (2, 20, rows)
        same(logits[..., :70], before[..., :70])
    varied.save_pretrained(tmp_path)
    again = NanochatForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, logits) and again.config.vocab_size == rows
    assert varied.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (2, 24)
    varied.train()(ids, labels=ids).loss.backward()
    assert varied.lm_head.weight.grad.shape == (rows, 64)


def test_new_rows_are_the_mean_or_drawn_as_their_table_was_and_padding_is_no_token():
    torch.manual_seed(0)
    means, model = (
        {},
        NanochatForCausalLM(
            NanochatConfig(**(build().config.to_dict() | dict(vocab_size=1000, hidden_size=128, head_dim=32)))
        ),
    )
    with torch.no_grad():
        for name in ("embed_tokens", "value_embeds.1", "value_embeds.3"):
            table = model.model.get_submodule(name).weight
            table[1000:] = 1e6  # what padding holds must not matter
            means[name] = table[:1000].mean(0)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.resize_token_embeddings(1500)
    for name, mean in means.items():
        same(model.model.get_submodule(name).weight[1000:], mean.expand(500, -1), 2e-4)
    assert not model.model.embed_tokens.weight.requires_grad and model.lm_head.weight.requires_grad
    model.resize_token_embeddings(3000, mean_resizing=False)
    for table, std in (
        (model.model.embed_tokens, 1.0),
        (model.model.value_embeds["1"], 128**-0.5),
        (model.lm_head, 0.001),
    ):
        assert abs(table.weight[1500:].std() / std - 1) < 0.03
    with pytest.raises(ValueError, match="new_num_tokens=0"):
        model.resize_token_embeddings(0)


def test_the_base_model_alone_resizes_too():
    base = build().model
    assert base.resize_token_embeddings() is base.embed_tokens and len(base.embed_tokens.weight) == 128
    base.resize_token_embeddings(110)
    assert {len(t.weight) for t in (base.embed_tokens, *base.value_embeds.values())} == {110}
    assert base(torch.tensor([[109]])).last_hidden_state.isfinite().all()


# Outputs


def test_outputs_as_tuple_as_mapping_and_by_config():
    model, ids = build(attn_implementation="eager"), tokens(2, 12)
    out = model(ids, labels=ids, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 5 and len(out.attentions) == 4
    assert all(a.shape == (2, 4, 12, 12) for a in out.attentions)
    same(out.attentions[0].sum(-1), torch.ones(2, 4, 12))
    assert (
        not out.attentions[0].triu(1).any()
        and not out.attentions[0].tril(-9).any()
        and out.attentions[3].tril(-9).any()
    )
    as_tuple = model(ids, labels=ids, output_hidden_states=True, output_attentions=True, return_dict=False)
    assert type(as_tuple) is tuple and torch.equal(as_tuple[0], out.loss) and torch.equal(as_tuple[1], out.logits)
    assert all(torch.equal(a, b) for a, b in zip(as_tuple[3], out.hidden_states, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(as_tuple[4], out.attentions, strict=True))
    base = model.model(ids, return_dict=False)
    assert type(base) is tuple and base[0].shape == (2, 12, 64)
    model.config.output_attentions = model.config.output_hidden_states = True
    by_config = model(ids)
    assert len(by_config.attentions) == 4 and len(by_config.hidden_states) == 5
    assert model(ids, output_hidden_states=False, output_attentions=False).hidden_states is None
    model.config.return_dict = False
    assert type(model(ids)) is tuple


def test_hidden_states_and_attentions_carry_gradients():
    model = build(attn_implementation="eager")
    out = model.model(tokens(2, 12), output_hidden_states=True, output_attentions=True)
    out.hidden_states[0].retain_grad()
    out.attentions[0].retain_grad()
    out.last_hidden_state.flatten()[0].backward()
    assert out.hidden_states[0].grad.any() and out.attentions[0].grad.any()


def test_training_leaves_the_logits_out_unless_asked_and_evaluation_gives_them():
    ids, model = tokens(2, 12), build().train()
    assert model(ids, labels=ids).logits is None and model(ids).logits.requires_grad
    asked = model(ids, labels=ids, skip_logits=False)
    same(asked.loss, model.loss_function(asked.logits, ids, vocab_size=100))
    assert model.eval()(ids, labels=ids).logits is not None and model(ids, labels=ids, skip_logits=True).logits is None
    # Trainer would wait for columns named so before it computes an evaluation loss
    assert find_labels(NanochatForCausalLM) == ["labels"]


def test_inputs_embeds_take_the_place_of_ids_only_where_no_value_embedding_needs_them():
    ids = tokens(2, 12)
    bare, whole = build(use_value_embeddings=False), build()
    same(bare(inputs_embeds=bare.model.embed_tokens(ids)).logits, bare(ids).logits)
    same(whole(ids, inputs_embeds=whole.model.embed_tokens(ids)).logits, whole(ids).logits)
    for model, arguments in ((whole, {"inputs_embeds": torch.zeros(1, 3, 64)}), (bare, {})):
        with pytest.raises(ValueError, match="give input_ids"):
            model(**arguments)


def test_a_row_is_the_same_alone_and_among_others_and_twice():
    model, ids = build(), tokens(5, 20)
    together = model(ids).logits
    assert torch.equal(model(ids).logits, together)
    for row in range(5):
        same(model(ids[row : row + 1]).logits[0], together[row])


def test_forty_steps_learn_a_batch_by_heart():
    torch.manual_seed(0)
    model, ids = NanochatForCausalLM(build().config).train(), tokens(2, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.2
    guessed = model.eval()(ids).logits[:, :-1].argmax(-1)
    assert (guessed == ids[:, 1:]).float().mean() > 0.9


# Attention implementations


def eagerly():
    """FlexAttention without the minute that compiling it takes; the slow test compiles it."""
    return torch.compiler.set_stance("force_eager")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", ["eager", "flex_attention"])
@pytest.mark.parametrize("padding", ["left", "right", None])
def test_implementations_agree_with_padding_and_past_the_window(kernel, padding):
    ids, mask = tokens(3, 40), None
    if padding:
        lengths = torch.tensor([40, 17, 30])[:, None]
        place = torch.arange(40)
        mask = (place >= 40 - lengths if padding == "left" else place < lengths).long()
    expected = build(attn_implementation="sdpa")(ids, attention_mask=mask).logits
    model = build()
    model.set_attn_implementation(kernel)
    with torch.no_grad(), eagerly():  # FlexAttention has no backward on the CPU
        out = model(ids, attention_mask=mask).logits
    seen = slice(None) if mask is None else mask.bool()
    same(out[seen], expected[seen], 1e-4)


def packed_positions():
    return torch.stack([torch.tensor([*range(11), *range(19)]), torch.tensor([*range(5), *range(20), *range(5)])])


def varlen_reference(query, key, value, borders, window, scaling):
    """What flash_attn_varlen_func returns: tokens of all rows in one line, documents by borders, a window of keys."""
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))  # (B·T, heads, D)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    out = torch.zeros_like(q)
    for start, end in pairwise(borders):
        for t in range(start, end):
            first = max(start, t + 1 - (window or end))
            weights = torch.einsum("hd,shd->hs", q[t], k[first : t + 1]).mul(scaling).softmax(-1)
            out[t] = torch.einsum("hs,shd->hd", weights, v[first : t + 1])
    return out.view(query.shape[0], query.shape[2], *q.shape[1:])


def test_the_flash_family_is_told_the_documents_of_all_rows(monkeypatch):
    """No GPU here: a stand-in under a name of the family computes attention from what FlashAttention would be given."""
    ids, heard = tokens(2, 30), []

    def stand_in(module, query, key, value, attention_mask, scaling, sliding_window, cu_seq_lens_q=None, **kwargs):
        assert attention_mask is None and query.dtype == key.dtype == value.dtype
        borders = [0, 30, 60] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
        if cu_seq_lens_q is not None:
            assert cu_seq_lens_q.dtype == torch.int32 and torch.equal(kwargs["cu_seq_lens_k"], cu_seq_lens_q)
            assert kwargs["max_length_q"] == kwargs["max_length_k"] == 30
        heard.append((borders, sliding_window))
        return varlen_reference(query, key, value, borders, sliding_window, scaling), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_stand_in", stand_in)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_stand_in", flash_attention_mask)
    model = build()
    model.config._attn_implementation = "flash_attention_stand_in"
    for positions, borders in (
        (packed_positions(), [0, 11, 30, 35, 55, 60]),
        (torch.arange(30)[None], [0, 30, 60]),
        (None, [0, 30, 60]),
    ):
        expected = build()(ids, position_ids=positions).logits
        heard.clear()
        same(model(ids, position_ids=positions).logits, expected, 1e-4)
        assert heard == [(borders, 9), (borders, 9), (borders, 9), (borders, None)]
    heard.clear()
    own = torch.tensor([0, 30, 60], dtype=torch.int32)  # a padding-free collator brings the borders itself
    model(ids, position_ids=packed_positions(), cu_seq_lens_q=own, cu_seq_lens_k=own, max_length_q=30, max_length_k=30)
    assert heard[0][0] == [0, 30, 60]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_flex_attention_isolates_packed_documents_too(compiled):
    ids, model = tokens(2, 30), build()
    expected = model(ids, position_ids=packed_positions()).logits
    model.set_attn_implementation("flex_attention")
    with torch.no_grad(), torch.compiler.set_stance("default") if compiled else eagerly():
        same(model(ids, position_ids=packed_positions()).logits, expected, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, VARIATIONS["no value embeddings"]], ids=["default", "of 2025"])
def test_inductor_compiles_training_as_one_graph(settings):
    ids, model = tokens(2, 24), build(**settings).train()
    plain = model(ids, position_ids=packed_positions()[:, :24], shift_labels=ids).loss
    plain.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True, dynamic=False)(
        ids, position_ids=packed_positions()[:, :24], shift_labels=ids
    ).loss
    loss.backward()
    same(loss, plain)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)
