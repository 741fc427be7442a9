"""Checkpoints of nanochat: the imported model computes what the reference's formulas say, and goes back bit for bit."""

import json
import os
import pickle

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanochat_hf.cli import export_nanochat, import_nanochat
from nanochat_hf.conversation import render
from nanochat_hf.interop import export_checkpoint, import_checkpoint
from nanochat_hf.interop.encoding import (
    encoding_from_tokenizer,
    read_encoding,
    split_in_merging,
    tokenizer_from_encoding,
)
from nanochat_hf.interop.fields import config_to_nanochat
from nanochat_hf.model import NanochatConfig
from nanochat_hf.tokenizer import train_tokenizer
from tests.support.nanochat_checkpoints import FIELDS, TEXT, formula, state_dict, write
from tests.support.processes import Run


@pytest.mark.parametrize("pattern", ["SSSL", "L", "SL"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_imported_model_computes_the_formulas(tmp_path, encoding, pattern, prefix):
    fields = FIELDS | {"window_pattern": pattern}
    import_checkpoint(write(tmp_path / "c", encoding, state_dict(fields, prefix), fields), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(fields["vocab_size"], (16,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        model(ids[None]).logits[0], formula(state_dict(fields), fields, ids), rtol=1e-4, atol=1e-4
    )


def test_old_checkpoints_get_the_values_they_were_trained_with(tmp_path, encoding):
    fields = {k: v for k, v in FIELDS.items() if k not in ("window_pattern", "n_kv_head")}
    whole = state_dict(FIELDS | {"n_kv_head": 4})
    weights = {k: v for k, v in whole.items() if "lambdas" not in k}
    source = write(tmp_path / "c", encoding, weights, fields)
    model, _ = import_checkpoint(source, tmp_path / "out")
    ids = torch.arange(16)
    same = weights | {"resid_lambdas": torch.ones(4), "x0_lambdas": torch.zeros(4)}
    torch.testing.assert_close(
        model(ids[None]).logits[0],
        formula(same, fields | {"n_kv_head": 4, "window_pattern": "L"}, ids),
        rtol=1e-4,
        atol=1e-4,
    )
    back = torch.load(export_checkpoint(tmp_path / "out", tmp_path / "back"), weights_only=True)
    assert back.keys() == weights.keys()
    assert json.loads((tmp_path / "back/meta_000007.json").read_text())["model_config"] == fields


def test_round_trip_is_exact(tmp_path, encoding):
    weights = state_dict(FIELDS)
    source = write(tmp_path / "base_checkpoints" / "d4", encoding, weights)
    (tmp_path / "tokenizer").mkdir()
    os.rename(source / "tokenizer.pkl", tmp_path / "tokenizer" / "tokenizer.pkl")  # where nanochat keeps it
    import_checkpoint(source, tmp_path / "out")
    path = export_checkpoint(tmp_path / "out", tmp_path / "back")
    assert path.name == "model_000007.pt"
    back = torch.load(path, weights_only=True)
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        assert back[name].dtype == value.dtype and torch.equal(back[name], value), name
    assert json.loads((tmp_path / "back/meta_000007.json").read_text()) == json.loads(
        (source / "meta_000007.json").read_text()
    )
    with open(tmp_path / "back/tokenizer.pkl", "rb") as file:
        assert pickle.load(file).__getstate__() == encoding.__getstate__()
    sizes = torch.load(tmp_path / "back/token_bytes.pt", weights_only=True)
    assert sizes.tolist() == [len(encoding.decode_single_token_bytes(i)) for i in range(291)] + [0] * 9


def test_imported_folder_talks(tmp_path, encoding):
    import_checkpoint(write(tmp_path / "c", encoding, state_dict(FIELDS)), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    assert (
        tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        == render(tokenizer, {"messages": messages})[0]
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.text(max_size=80),
        st.lists(st.sampled_from([*" ".join(TEXT).split(), "\u017f", "'S", "\u2028", "\r\n", " ", "1234", "aaaa"])).map(
            " ".join
        ),
    )
)
def test_rebuilt_tokenizer_says_what_tiktoken_says(encoding, text):
    arguments = encoding.__getstate__()
    tokenizer = tokenizer_from_encoding(arguments)
    expected = encoding.encode_ordinary(text)
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    assert backend.encode(text, add_special_tokens=False).ids == expected
    assert encoding_from_tokenizer(tokenizer, "rustbpe") == arguments


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80))
def test_our_own_tokenizer_means_the_same_in_tiktoken(trained, text):
    tokenizer, ours = trained
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    assert ours.encode_ordinary(text) == backend.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def trained():
    tokenizer = train_tokenizer(TEXT, 300)
    return tokenizer, tiktoken.Encoding(**encoding_from_tokenizer(tokenizer))


def test_split_in_merging():
    assert split_in_merging(b"abc", {b"ab": 256, b"abc": 257}) == [b"ab", b"c"]
    assert split_in_merging(b"abc", {b"abc": 256}) == [b"a", b"b", b"c"]  # nothing merges into it


class _Hostile:
    def __init__(self, call, *arguments):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


def test_hostile_pickles_are_refused_and_not_run(tmp_path, encoding):
    path, marker = tmp_path / "tokenizer.pkl", tmp_path / "ran"
    for payload in (
        _Hostile(os.mkdir, str(marker)),
        _Hostile(eval, f"open({str(marker)!r}, 'w')"),
        [encoding, _Hostile(os.mkdir, str(marker))],
    ):
        path.write_bytes(pickle.dumps(payload))
        with pytest.raises(ValueError, match="it asks for"):
            read_encoding(path)
    path.write_bytes(b"ctiktoken.load\nread_file\n(V" + str(marker).encode() + b"\ntR.")
    with pytest.raises(ValueError, match="it asks for tiktoken.load.read_file"):
        read_encoding(path)
    torch.save({"lm_head.weight": _Hostile(os.mkdir, str(marker))}, tmp_path / "model_000001.pt")
    (tmp_path / "meta_000001.json").write_text(json.dumps({"model_config": FIELDS}))
    with pytest.raises(ValueError, match="not a file of tensors"):
        import_checkpoint(tmp_path, tmp_path / "out")
    assert not marker.exists()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_pickles_raise_valueerror(tmp_path_factory, encoding, data):
    whole = pickle.dumps(encoding)
    cut = data.draw(st.integers(0, len(whole) - 1))
    damaged = data.draw(
        st.sampled_from(
            [whole[:cut], whole[:cut] + data.draw(st.binary(min_size=1, max_size=9)), data.draw(st.binary(max_size=30))]
        )
    )
    path = tmp_path_factory.getbasetemp() / "damaged.pkl"
    path.write_bytes(damaged)
    with pytest.raises(ValueError):
        read_encoding(path)


def drop(*names):
    return lambda weights, meta: [weights.pop(name) for name in list(weights) if name.endswith(names)]


def put(name, value):
    return lambda weights, meta: weights.update({name: value})


def field(name, value):
    return lambda weights, meta: meta.update({name: value})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (drop("h.1.mlp.c_fc.weight"), "lacks transformer.h.1.mlp.c_fc.weight"),
        (drop("ve_gate.weight"), "lacks transformer.h.1.attn.ve_gate.weight"),
        (put("transformer.h.0.bias", torch.ones(3)), "unknown transformer.h.0.bias"),
        (put("lm_head.weight", torch.ones(3, 64)), r"lm_head.weight has shape \(3, 64\).*\(320, 64\)"),
        (put("lm_head.weight", torch.ones(320, 64, dtype=torch.int32)), "lm_head.weight holds torch.int32"),
        (field("n_embd", "64"), "n_embd='64' must be a positive whole number"),
        (field("n_layer", None), "lacks n_layer"),
        (field("n_head", 3), "hidden_size=64 must be a multiple"),
        (field("window_pattern", "SX"), "must be made of the letters S and L"),
        (field("vocab_size", 299), "the tokenizer has 300 tokens, the model 299"),
    ],
)
def test_unfit_checkpoints_say_why(tmp_path, encoding, spoil, reason):
    weights, fields = state_dict(FIELDS), dict(FIELDS)
    spoil(weights, fields)
    with pytest.raises(ValueError, match=reason):
        import_checkpoint(write(tmp_path / "c", encoding, weights, fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_that_nanochat_cannot_describe_are_refused():
    sizes = dict(vocab_size=300, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=16)
    assert config_to_nanochat(NanochatConfig(**sizes))[0]["window_pattern"] == "SSSL"
    for name, value in {
        "sliding_window": 4,
        "intermediate_size": 100,
        "rope_theta": 5e5,
        "final_logit_softcapping": 30.0,
    }.items():
        with pytest.raises(ValueError, match=f"{name}={value} cannot be told to nanochat"):
            config_to_nanochat(NanochatConfig(**sizes, **{name: value}))


def test_scripts_work_and_fail_in_one_line(tmp_path, encoding, capsys):
    source = write(tmp_path / "c", encoding, state_dict(FIELDS))
    arguments = ["--checkpoint-dir", str(source), "--output", str(tmp_path / "out")]
    run = Run("scripts.import_nanochat", arguments, tmp_path / "log")  # once as a user does
    assert run.wait() == [0] and "300 tokens" in run.text(), run.text()
    export_nanochat.main(["--model", str(tmp_path / "out"), "--output", str(tmp_path / "back")])
    assert "model_000007.pt" in capsys.readouterr().out
    for script, flags, reason in (
        (import_nanochat, {"checkpoint-dir": source, "output": tmp_path / "out"}, "already holds something"),
        (
            import_nanochat,
            {"checkpoint-dir": source, "output": tmp_path / "new", "step": 8},
            "meta_000008.json: no such file",
        ),
        (import_nanochat, {"checkpoint-dir": source, "output": tmp_path / "new", "step": "x"}, "--step"),
        (
            import_nanochat,
            {"checkpoint-dir": source, "output": tmp_path / "new", "tokenizer": tmp_path},
            "no tokenizer.pkl in",
        ),
        (import_nanochat, {"checkpoint-dir": tmp_path / "none", "output": tmp_path / "new"}, "no such folder"),
        (export_nanochat, {"model": tmp_path / "out", "output": tmp_path / "back"}, "exists already"),
        (
            export_nanochat,
            {"model": tmp_path / "out", "output": tmp_path / "new", "step": -1},
            "--step -1 must not be negative",
        ),
        (export_nanochat, {"model": tmp_path / "none", "output": tmp_path / "new"}, "none"),
    ):
        with pytest.raises(SystemExit) as stopped:
            script.main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
        assert stopped.value.code == 2 and reason in capsys.readouterr().err
