"""What an exported folder holds: tables of exactly as many rows as there are tokens, whatever training pads."""

import torch
from safetensors.torch import load_file

from nanochat_hf import NanochatForCausalLM
from nanochat_hf.interop.folder import export
from nanochat_hf.tokenizer import train_tokenizer
from tests.support.models import build, tokens


def test_a_folder_has_a_row_for_each_token_and_the_model_keeps_its_padding(tmp_path):
    tokenizer, model, ids = train_tokenizer(["a b c"] * 9, 265), build(vocab_size=265), tokens(2, 12)
    expected = model(ids).logits
    for weights in (None, model.state_dict()):
        export(model, tokenizer, tmp_path / "final", weights)
        rows = {
            n: len(t)
            for n, t in load_file(tmp_path / "final" / "model.safetensors").items()
            if "embed" in n or "lm_head" in n
        }
        assert len(rows) == 4 and set(rows.values()) == {265}
        again = NanochatForCausalLM.from_pretrained(tmp_path / "final")
        assert again.config.pad_vocab_to_multiple_of == 1 and torch.equal(again(ids).logits, expected)
    assert len(model.lm_head.weight) == 320 and model.config.pad_vocab_to_multiple_of == 64
    export(model, tokenizer, tmp_path / "whole", keep_padding=True)
    assert len(NanochatForCausalLM.from_pretrained(tmp_path / "whole").lm_head.weight) == 320


def test_training_pads_what_it_loads_and_no_result_changes(tmp_path):
    model, ids = build(vocab_size=265, pad_vocab_to_multiple_of=1), tokens(2, 12)
    model.model.embed_tokens.weight.requires_grad_(False)
    expected = model(ids).logits
    model.pad_tables(64)
    assert {len(table.weight) for table in model.tables()} == {320} and torch.equal(model(ids).logits, expected)
    assert not model.model.embed_tokens.weight.requires_grad and model.lm_head.weight.requires_grad
    model.train()(ids, labels=ids).loss.backward()
    assert not model.lm_head.weight.grad[265:].any()
    model.pad_tables(1)
    assert {len(table.weight) for table in model.tables()} == {265} and torch.equal(model.eval()(ids).logits, expected)
