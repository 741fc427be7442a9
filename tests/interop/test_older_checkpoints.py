"""Models of 2025, before value embeddings: transformers' own NanoChat, and checkpoints of nanochat itself."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, NanoChatConfig, NanoChatForCausalLM

from nanochat_hf.interop import export_checkpoint, import_checkpoint
from nanochat_hf.interop.fields import config_to_nanochat
from nanochat_hf.model import NanochatConfig, NanochatForCausalLM
from nanochat_hf.tokenizer import train_tokenizer
from tests.support.nanochat_checkpoints import FIELDS, TEXT, formula, state_dict, write

SIZES = dict(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """transformers' model with random weights, saved with a tokenizer; (model, folder)."""
    folder = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(0)
    model = NanoChatForCausalLM(NanoChatConfig(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # the table stays small, so that the epsilon of the norm shows
            parameter.copy_(
                torch.randn_like(parameter) * (0.002 if parameter is model.model.embed_tokens.weight else 0.15)
            )
    model.save_pretrained(folder)
    train_tokenizer(TEXT, 300).save_pretrained(folder)
    return model, folder


def test_transformers_own_checkpoint_computes_the_same(theirs, tmp_path):
    model, folder = theirs
    ids = torch.randint(4, 290, (2, 40), generator=torch.Generator().manual_seed(0))
    ours, tokenizer = import_checkpoint(folder, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not list(again.model.value_embeds) and again.config.layer_types == ["full_attention"] * 3
    expected = model(ids).logits
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-5, atol=2e-5)
    prompt = ids[:, :9]
    assert torch.equal(
        again.generate(prompt, do_sample=False, max_new_tokens=40),
        model.generate(
            prompt,
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=again.generation_config.eos_token_id,
            pad_token_id=again.generation_config.pad_token_id,
        ),
    )
    assert (
        ours.generation_config.eos_token_id[0]
        == tokenizer.eos_token_id
        == tokenizer.convert_tokens_to_ids("<|assistant_end|>")
    )


def test_settings_that_cannot_be_and_other_models_are_refused_in_one_line(theirs, tmp_path):
    _, folder = theirs
    config = json.loads((folder / "config.json").read_text())
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in folder.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    for spoilt, reason in (
        (config | {"hidden_act": "gelu"}, "hidden_act=gelu is not in this architecture, which has relu2"),
        (config | {"attention_bias": True}, "attention_bias=True"),
        (config | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type=linear"),
        (config | {"vocab_size": 301}, "the tokenizer has 300 tokens, the model 301"),
        (LlamaConfig().to_dict(), "of type llama"),
        (NanochatConfig().to_dict(), "already one of ours"),
    ):
        (changed / "config.json").write_text(json.dumps(spoilt))
        with pytest.raises(ValueError, match=reason) as error:
            import_checkpoint(changed, tmp_path / "out")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    with pytest.raises(
        ValueError, match="model_type=nanochat is another model than nanochat_hf; scripts.import_nanochat"
    ):
        NanochatForCausalLM.from_pretrained(folder)  # it would be loaded with random weights
    with pytest.raises(ValueError, match="--step 3: .* has no steps"):
        import_checkpoint(folder, tmp_path / "out", step=3)


def test_nanochats_own_checkpoints_of_2025_come_in_and_go_back(tmp_path, encoding):
    fields = {k: v for k, v in FIELDS.items() if k != "window_pattern"}
    weights = {
        n: w
        for n, w in state_dict(FIELDS).items()
        if not any(part in n for part in ("value_embeds", "ve_gate", "lambdas"))
    }
    model, _ = import_checkpoint(write(tmp_path / "c", encoding, weights, fields), tmp_path / "out")
    same = weights | {"resid_lambdas": torch.ones(4), "x0_lambdas": torch.zeros(4)}
    ids = torch.arange(16)
    # without gates the formula adds nothing: gated tables of zeros say the same
    for i in (1, 3):
        same |= {
            f"value_embeds.{i}.weight": torch.zeros(320, 32),
            f"transformer.h.{i}.attn.ve_gate.weight": torch.zeros(2, 32),
        }
    expected = formula(same, FIELDS | {"window_pattern": "L"}, ids)
    torch.testing.assert_close(model(ids[None]).logits[0], expected, rtol=1e-4, atol=1e-4)
    back = torch.load(export_checkpoint(tmp_path / "out", tmp_path / "back"), weights_only=True)
    assert back.keys() == weights.keys() and all(torch.equal(back[n], w) for n, w in weights.items())


def test_a_model_without_value_embeddings_that_nanochat_never_made_is_refused():
    with pytest.raises(ValueError, match="use_value_embeddings=False cannot be told to nanochat"):
        config_to_nanochat(NanochatConfig(**SIZES | dict(intermediate_size=None), use_value_embeddings=False))
