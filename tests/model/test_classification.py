"""Scores of texts and of tokens: what the classes compute, and that a saved language model loads as them."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.model import NanochatForSequenceClassification, NanochatForTokenClassification

PAD = 0


def config(**more):
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return NanochatConfig(**sizes, max_position_embeddings=32, pad_token_id=PAD, num_labels=3, **more)


def noisy(model):
    """All weights random: a new model's output projections are zero, and so would be what they do."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_is_scored_by_its_last_token_on_either_side_of_the_padding(side):
    torch.manual_seed(0)
    model = noisy(NanochatForSequenceClassification(config(rope_in_bfloat16=False)))  # else positions shift by rounding
    texts = [torch.randint(1, 64, (n,)) for n in (3, 7)]
    padding = torch.full((4,), PAD)
    short = torch.cat((padding, texts[0]) if side == "left" else (texts[0], padding))
    ids = torch.stack((short, texts[1]))
    got = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits
    alone = torch.cat([model.score(model.model(text[None]).last_hidden_state[:, -1]) for text in texts])
    torch.testing.assert_close(got, alone)


def test_every_token_is_scored_and_learned_from():
    torch.manual_seed(0)
    model = noisy(NanochatForTokenClassification(config()))
    ids, labels = torch.randint(1, 64, (2, 5)), torch.randint(3, (2, 5))
    labels[0, :2] = -100
    found = model(input_ids=ids, labels=labels)
    logits = model.score(model.model(ids).last_hidden_state)
    torch.testing.assert_close(found.logits, logits)
    nll = -logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(found.loss, nll[labels != -100].mean())


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
@pytest.mark.parametrize("remote", [False, True], ids=["installed", "remote code"])
def test_a_saved_language_model_loads_as_a_classifier(tmp_path, auto, remote):
    torch.manual_seed(0)
    saved = noisy(NanochatForCausalLM(config()))
    saved.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path, trust_remote_code=remote, num_labels=1)
    assert again.score.weight.shape == (1, 64)
    ids = torch.randint(1, 64, (1, 6))
    expected = saved.model(ids).last_hidden_state
    torch.testing.assert_close(again.eval().model(ids).last_hidden_state, expected)
