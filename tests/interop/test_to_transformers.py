"""Export to transformers' own NanoChat: equal logits without remote code, or the parts that it lacks."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, NanoChatForCausalLM

from nanochat_hf.cli import export_transformers
from nanochat_hf.interop import Decisions, import_checkpoint
from nanochat_hf.interop.folder import without_padding
from nanochat_hf.interop.to_transformers import export_to_transformers
from nanochat_hf.tokenizer import train_tokenizer
from tests.support.models import LATER, build
from tests.support.nanochat_checkpoints import FIELDS, TEXT, state_dict, write

PLAIN = dict(vocab_size=300, use_value_embeddings=False, window_pattern="L", rope_in_bfloat16=False)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT, 300)


def saved(folder, tokenizer, **changes):
    """A model's folder; its residual scalars change nothing, unless `lambdas`."""
    lambdas = changes.pop("lambdas", False)
    model = build(**(PLAIN | changes))
    if not lambdas:
        torch.nn.init.ones_(model.model.resid_lambdas)
        torch.nn.init.zeros_(model.model.x0_lambdas)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_logits_are_equal_and_no_code_ships(tokenizer, tmp_path):
    model, lines = saved(tmp_path / "ours", tokenizer, head_dim=24, intermediate_size=96), []
    export_to_transformers(tmp_path / "ours", tmp_path / "theirs", lines.append)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    assert type(theirs) is NanoChatForCausalLM and not lines
    ids = torch.randint(4, 290, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert not list((tmp_path / "theirs").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "theirs" / "config.json").read_text())
    again = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert again("the cat").input_ids == tokenizer("the cat").input_ids and again.chat_template


def test_out_and_in_again_is_the_same_model(tokenizer, tmp_path):
    model = saved(tmp_path / "ours", tokenizer)
    export_to_transformers(tmp_path / "ours", tmp_path / "theirs")
    back, _ = import_checkpoint(tmp_path / "theirs", tmp_path / "back")
    own, other = (without_padding(m.state_dict(), 300) for m in (model, back))
    assert own.keys() == other.keys() and all(torch.equal(value, own[name]) for name, value in other.items())


def test_nanochats_own_checkpoint_of_2025_goes_through(encoding, tmp_path):
    fields = {k: v for k, v in FIELDS.items() if k != "window_pattern"}
    old = {n: w for n, w in state_dict(FIELDS).items() if not any(p in n for p in ("value_emb", "ve_gate", "lambdas"))}
    source = write(tmp_path / "c", encoding, old, fields)
    model, _ = import_checkpoint(source, tmp_path / "ours", decisions=Decisions(say=lambda line: None))
    lines = []
    export_to_transformers(tmp_path / "ours", tmp_path / "theirs", lines.append)
    theirs = NanoChatForCausalLM.from_pretrained(tmp_path / "theirs")
    ids = torch.arange(16)[None]
    assert len(lines) == 1 and "rounded to bfloat16" in lines[0]
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=0, atol=0.05)
    model.config.rope_in_bfloat16 = False
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(use_value_embeddings=True), "has value embeddings, which"),
        (dict(window_pattern="SL"), "has windows of 9 keys, which"),
        (dict(lambdas=True), "residual scalars other than 1, scalars of the embedding other than 0"),
        ({name: LATER[name] for name in ("smear", "backout", "qk_scale")}, "has smear, backout, qk_scale 1.2, which"),
    ],
)
def test_later_parts_are_named_in_one_line(changes, parts, tokenizer, tmp_path, capsys):
    saved(tmp_path / "ours", tokenizer, **changes)
    with pytest.raises(SystemExit) as stopped:
        export_transformers.main(["--model", str(tmp_path / "ours"), "--output", str(tmp_path / "theirs")])
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stopped.value.code == 2 and len(said) == 1 and parts in said[0]
    assert not (tmp_path / "theirs").exists()
