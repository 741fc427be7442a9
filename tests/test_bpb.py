"""Bits per byte do not depend on how the text lies; token bytes come from the raw vocabulary."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.evals.bpb import evaluate_bpb, raw_token_bytes, text_batches
from nanochat_hf.tokenizer import token_bytes, train_tokenizer
from scripts.base_eval import main

TEXTS = [f"{'naïve café ' * (i % 5)}the cat sat {'on a mat ' * (i % 4)}🙂 {i}" for i in range(17)]
GPT2 = Path("../shared/data/tokenizers/gpt2")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def make(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=256))
    else:
        sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
        model = NanochatForCausalLM(NanochatConfig(vocab_size=300, max_position_embeddings=256, **sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.mark.parametrize("kind", ["nanochat", "gpt2"])
def test_five_geometries_give_one_number(tokenizer, kind):
    model, sizes, values = make(kind), raw_token_bytes(tokenizer), []
    nats = count = 0
    with torch.no_grad():  # the plain way: every text alone
        for text in TEXTS:
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
            logp = model(ids).logits[0].float().log_softmax(-1)
            nats -= sum(logp[t, i].item() for t, i in enumerate(ids[0, 1:]))
            count += len(text.encode())
    expected = nats / math.log(2) / count
    for rows, world, positions in ((1, 1, 128), (4, 1, 128), (16, 1, 200), (2, 2, 128), (3, 3, 256)):
        sums = []

        def reduce(tensor, sums=sums):
            sums.append(tensor)
            return torch.stack(sums).sum(0)  # the last rank sees the sum of all

        for rank in range(world):
            batches = text_batches(TEXTS, tokenizer, rows=rows, positions=positions, rank=rank, world_size=world)
            value = evaluate_bpb(model, batches, sizes, reduce=reduce)
        values.append(value)
    assert values == pytest.approx([expected] * 5, rel=1e-6)


def test_long_texts_are_split_and_nothing_is_lost(tokenizer):
    sizes = raw_token_bytes(tokenizer)
    for positions in (8, 33):
        targets = [b["shift_labels"] for b in text_batches(TEXTS, tokenizer, rows=2, positions=positions)]
        total = sum(sizes[t[t >= 0]].sum().item() for t in targets)
        assert total == sum(len(t.encode()) for t in TEXTS)


def test_no_bytes_is_infinite(tokenizer):
    assert evaluate_bpb(make("nanochat"), [], raw_token_bytes(tokenizer)) == math.inf


def test_byte_level_sizes_are_those_of_our_own_tokenizer(tokenizer):
    assert torch.equal(raw_token_bytes(tokenizer), token_bytes(tokenizer))


def test_gpt2_sizes_add_up_to_the_text(tmp_path):
    if not GPT2.exists():
        pytest.skip(f"no GPT-2 vocabulary at {GPT2}")
    vocabulary = json.loads(gzip.open(GPT2 / "encoder.json.gz").read())
    merges = [tuple(line.split()) for line in gzip.open(GPT2 / "vocab.bpe.gz", "rt", encoding="utf-8").read().splitlines()[1:] if line]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    gpt2 = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    sizes = raw_token_bytes(gpt2)
    text = "Zwölf Boxkämpfer 🙂🙃 jagen 日本語 — naïve\n\n\tcafé"
    assert sizes[gpt2.encode(text)].sum() == len(text.encode()) and sizes[gpt2.eos_token_id] == 0


def test_byte_fallback_vocabularies_count_bytes_too():
    letters = ["▁", "a", "é", "▁a"]
    vocabulary = {t: i for i, t in enumerate([*letters, *(f"<0x{b:02X}>" for b in range(256))])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "a aé 🙂"
    assert raw_token_bytes(tokenizer)[tokenizer.encode(text)].sum() == len(text.encode())


def test_tokenizers_that_do_not_tell_their_bytes_are_refused():
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="neither byte-level"):
        raw_token_bytes(PreTrainedTokenizerFast(tokenizer_object=words))


def test_script_takes_any_causal_model(tmp_path, tokenizer):
    make("gpt2").save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    run = ["--model", str(tmp_path / "gpt2"), "--eval", "bpb", "--data", str(tmp_path / "texts.jsonl")]
    small, large = (main([*run, "--batch-tokens", str(n)])["bpb"] for n in (1, 8192))
    assert small == pytest.approx(large, rel=1e-6)
