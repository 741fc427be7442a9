"""Checkpoints of every date: told apart by tensors, meta file, loss or user, and computed as nanochat did then."""

import json

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from nanochat_hf.cli import import_nanochat
from nanochat_hf.interop import Decisions, export_checkpoint, import_checkpoint
from nanochat_hf.interop.dates import origin_of
from nanochat_hf.interop.encoding import tokenizer_from_encoding, with_atomic_intervals
from nanochat_hf.interop.fields import config_to_nanochat
from nanochat_hf.recipes import ARCHITECTURES
from nanochat_hf.scaling import model_config
from tests.support.nanochat_checkpoints import FIELDS, write
from tests.support.nanochat_eras import ERAS, logits, state_dict

# 384 positions: windows of 192, 128 and 128 before the query, all shorter than the sequence
LONG = FIELDS | dict(sequence_len=384, n_embd=48, n_layer=3, window_pattern="SL")


def imported(folder, encoding, era, fields=FIELDS, decisions=None, **meta):
    """(model, lines that were said) of a checkpoint of a date."""
    said = []
    options = dict(recipe=None, probe=None, sequence_len=None) | (decisions or {})
    source = write(folder / "source", encoding, state_dict(fields, ERAS[era]), fields, **meta)
    model, _ = import_checkpoint(source, folder / "out", decisions=Decisions(**options, say=said.append))
    return model, said


@pytest.mark.parametrize("era", ERAS)
def test_each_date_computes_its_formulas(tmp_path, encoding, era):
    imported(tmp_path, encoding, era, LONG, dict(recipe=era))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(300, (384,), generator=torch.Generator().manual_seed(1))
    expected = logits(state_dict(LONG, ERAS[era]), LONG, ids, ERAS[era])
    torch.testing.assert_close(model(ids[None]).logits[0], expected, rtol=0, atol=1e-5)
    for other, formula in ERAS.items():  # so the test would see any other date's formula
        if other != era and formula.gate_channels == ERAS[era].gate_channels and formula.smear == ERAS[era].smear:
            wrong = logits(state_dict(LONG, ERAS[era]), LONG, ids, formula)
            assert (wrong - expected).abs().max() > 1e-2, other


@pytest.mark.parametrize("era", ERAS)
def test_each_date_goes_back_bit_for_bit(tmp_path, encoding, era):
    _, said = imported(tmp_path, encoding, era, decisions=dict(recipe=era), loop_state={"min_val_bpb": 1.0})
    lines = []
    path = export_checkpoint(tmp_path / "out", tmp_path / "back", say=lines.append)
    back, weights = torch.load(path, weights_only=True), state_dict(FIELDS, ERAS[era])
    assert back.keys() == weights.keys()
    assert all(back[n].dtype == w.dtype and torch.equal(back[n], w) for n, w in weights.items())
    before, after = (json.loads((tmp_path / f / "meta_000007.json").read_text()) for f in ("source", "back"))
    assert before == after and era in said[0] and len(lines) == 1
    assert (tmp_path / "back/tokenizer.pkl").read_bytes() == (tmp_path / "source/tokenizer.pkl").read_bytes()


BASE = dict(loop_state={}, device_batch_size=32)
FEBRUARY, CAP20 = "feb2026", "mar2026-cap20"


@pytest.mark.parametrize(
    ("meta", "name", "open_"),
    [
        ({}, FEBRUARY, True),
        (BASE | dict(total_batch_size=2**19, user_config=dict(eval_tokens=41943040)), CAP20, False),
        (BASE | dict(total_batch_size=2**19, dataloader_state_dict=dict(pq_idx=1822)), CAP20, False),
        (BASE | dict(total_batch_size=2**19, dataloader_state_dict=dict(pq_idx=1821)), FEBRUARY, True),
        (BASE | dict(user_config=dict(eval_tokens=20971520)), FEBRUARY, False),  # before 16 February
        (BASE | dict(total_batch_size=2**19, user_config=dict(eval_tokens=20971520)), FEBRUARY, True),
        (dict(user_config=dict(dry_run=False, dtype="bfloat16", init_lr_frac=1.0)), FEBRUARY, False),
        (dict(user_config=dict(chatcore_every=200, eval_tokens=41943040)), FEBRUARY, True),  # 40·2^20 may be anyone's
    ],
)
def test_the_meta_file_tells_what_tensors_cannot(meta, name, open_):
    origin = origin_of(state_dict(FIELDS), meta)
    assert origin.name == name and bool(origin.others) == open_
    assert ("is assumed" in origin.told()) == open_ and f"soft-cap {ERAS[name].cap:g}" in origin.told()
    assert not open_ or "mar2026-cap20 (soft-cap 20)" in origin.told()


def test_tensors_come_first_and_a_recipe_that_they_contradict_is_refused():
    for era, weights in {era: state_dict(FIELDS, formula) for era, formula in ERAS.items()}.items():
        fitting = [FEBRUARY, CAP20] if ERAS[era].gate_channels == 32 else [era]
        for name in (*ARCHITECTURES, "head"):
            if ("mar2026" if name == "head" else name) in fitting:
                assert not origin_of(weights, {}, name).others
            else:
                with pytest.raises(ValueError, match=f"--recipe {name} does not fit this checkpoint"):
                    origin_of(weights, {}, name)
    with pytest.raises(ValueError, match="--recipe may2026 is unknown; choose from feb2026, mar2026-cap20"):
        origin_of(state_dict(FIELDS), {}, "may2026")


def test_dates_that_no_architecture_here_computes_are_refused():
    weights = state_dict(FIELDS)
    with pytest.raises(ValueError, match="bigram_embed.weight.*27 and 28 January 2026 only.*cannot be imported"):
        origin_of(weights | {"bigram_embed.weight": torch.zeros(3, 3)}, {})
    with pytest.raises(ValueError, match="value gates of 7 channels"):
        origin_of(weights | {n: torch.zeros(2, 7) for n in weights if "ve_gate" in n}, {})
    for name in ("smear_gate.weight", "smear_lambda", "backout_lambda"):
        partial = {n: w for n, w in state_dict(FIELDS, ERAS["mar2026"]).items() if n != name}
        assert origin_of(partial, {}).name == "mar2026"


def test_an_incomplete_smear_is_named(tmp_path, encoding):
    weights = state_dict(FIELDS, ERAS["mar2026"])
    del weights["smear_lambda"]
    with pytest.raises(ValueError, match="lacks smear_lambda"):
        import_checkpoint(write(tmp_path / "c", encoding, weights), tmp_path / "out")


def certain(weights, bias):
    """The weights with logits of the next id so large that a soft-cap shows: the head copies, ids count upwards."""
    head = torch.zeros_like(weights["lm_head.weight"])
    table = weights["transformer.wte.weight"].float()
    head[1:] = bias * table[:-1]
    silent = {n: torch.zeros_like(w) for n, w in weights.items() if ".c_proj." in n or n == "x0_lambdas"}
    return weights | silent | {"lm_head.weight": head, "resid_lambdas": torch.ones_like(weights["resid_lambdas"])}


def test_a_probed_text_decides_the_soft_cap(tmp_path, encoding):
    text = "".join(chr(97 + i % 26) for i in range(200))  # each letter's id follows the one before
    source = write(tmp_path / "c", encoding, certain(state_dict(FIELDS), 0.5))
    for probe, cap in ((text, 20.0), ("".join(reversed(text)), 15.0)):  # sure and right wants the higher cap
        said = []
        out = tmp_path / f"{cap}"
        model, _ = import_checkpoint(source, out, decisions=Decisions(probe=probe, say=said.append))
        assert (
            model.config.final_logit_softcapping == cap and "with soft-cap 20" in said[0] and "assumed" not in said[0]
        )
    with pytest.raises(ValueError, match="--probe: the text has 1 tokens"):
        import_checkpoint(source, tmp_path / "none", decisions=Decisions(probe="a"))


TUNED = dict(user_config=dict(init_lr_frac=0.8, model_tag=None))


def test_fine_tuned_checkpoints_say_whose_windows_they_have(tmp_path, encoding):
    root = tmp_path / "nanochat"
    short = LONG | dict(sequence_len=128)
    weights = state_dict(short)
    source = write(root / "chatsft_checkpoints" / "d3", encoding, weights, short, **TUNED)
    said = []
    import_checkpoint(source, tmp_path / "alone", decisions=Decisions(say=said.append))
    assert "its sequence_len 128 is fine-tuning's own" in said[1] and "--sequence-len" in said[1]
    write(root / "base_checkpoints" / "d3", encoding, weights, LONG)
    said.clear()
    import_checkpoint(source, tmp_path / "beside", decisions=Decisions(say=said.append))
    assert "was trained with 384: --sequence-len 384 keeps the base's windows" in said[1]
    said.clear()
    model, _ = import_checkpoint(source, tmp_path / "base", decisions=Decisions(sequence_len=384, say=said.append))
    assert model.config.sliding_window == 193 and len(said) == 1
    export_checkpoint(tmp_path / "base", tmp_path / "back", say=said.append)
    assert json.loads((tmp_path / "back/meta_000007.json").read_text())["model_config"] == short


def test_models_made_here_go_to_the_nanochat_that_computes_the_same():
    for name, fields in ARCHITECTURES.items():
        made = model_config(4, 300, 512, head_dim=64, **fields)
        assert config_to_nanochat(made)[1] == name
    mixed = model_config(4, 300, 512, head_dim=64, **{**ARCHITECTURES["mar2026"], "qk_scale": 1.3})
    with pytest.raises(ValueError, match="qk_scale=1.3 cannot be told to nanochat, which would compute with 1.2"):
        config_to_nanochat(mixed)


def test_the_command_tells_what_it_assumed(tmp_path, encoding, capsys):
    source = write(tmp_path / "c", encoding, state_dict(FIELDS))
    import_nanochat.main(["--checkpoint-dir", str(source), "--output", str(tmp_path / "out")])
    assert "feb2026, soft-cap 15, is assumed" in capsys.readouterr().out
    import_nanochat.main(
        ["--checkpoint-dir", str(source), "--output", str(tmp_path / "cap"), "--recipe", "mar2026-cap20"]
    )
    assert "is assumed" not in capsys.readouterr().out
    config = json.loads((tmp_path / "cap" / "config.json").read_text())
    assert config["final_logit_softcapping"] == 20.0


# Tokenizers

POSSESSIVE = r"'(?i:[sdmt]|ll)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}+| ?(?:[^\s\p{L}\p{N}]){2}+[\r\n]*|\s++|."


@pytest.mark.parametrize(
    ("pattern", "meaning"),
    [
        (r"\p{N}{1,3}+", r"(?>\p{N}{1,3})"),
        (r"[a\]{]{2}+b", r"(?>[a\]{]{2})b"),
        (r"(?:a|(b)){1,}+c", r"(?>(?:a|(b)){1,})c"),
        (r"a{2}|\{2}+", r"a{2}|\{2}+"),  # the escaped brace begins no interval
        (r"x{,4}+y{3}", r"(?>x{,4})y{3}"),
        (r"\s++\p{L}?+", r"\s++\p{L}?+"),
    ],
)
def test_possessive_intervals_become_atomic_groups(pattern, meaning):
    assert with_atomic_intervals(pattern) == meaning


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="a1 2.3!\n", max_size=40))
def test_possessive_tokenizers_keep_their_ids(encoding, text):
    state = encoding.__getstate__() | {"pat_str": POSSESSIVE}
    theirs = tiktoken.Encoding(**state)
    ours = tokenizer_from_encoding(state).backend_tokenizer
    assert ours.encode(text, add_special_tokens=False).ids == theirs.encode_ordinary(text)


def test_a_possessive_tokenizer_goes_back_as_it_was(tmp_path, encoding):
    state = encoding.__getstate__() | {"pat_str": POSSESSIVE}
    source = write(tmp_path / "c", tiktoken.Encoding(**state), state_dict(FIELDS))
    _, tokenizer = import_checkpoint(source, tmp_path / "out", decisions=Decisions(say=lambda line: None))
    assert len(tokenizer.encode("1234567", add_special_tokens=False)) >= 3
    export_checkpoint(tmp_path / "out", tmp_path / "back", say=lambda line: None)
    assert (tmp_path / "back/tokenizer.pkl").read_bytes() == (source / "tokenizer.pkl").read_bytes()
