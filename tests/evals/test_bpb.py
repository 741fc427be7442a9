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
from nanochat_hf.cli.base_eval import main
from nanochat_hf.data.collate import PackingCollator
from nanochat_hf.data.packing import plan_rows
from nanochat_hf.evals.bpb import evaluate_bpb, text_batches
from nanochat_hf.evals.raw_bytes import raw_token_bytes
from nanochat_hf.evals.scoring import Scorer
from nanochat_hf.tokenizer import token_bytes, train_tokenizer

TEXTS = [f"{'naïve café ' * (i % 5)}the cat sat {'on a mat ' * (i % 4)}🙂 {i}" for i in range(17)]
GPT2 = Path("../shared/data/tokenizers/gpt2")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 290)


def make(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=290, n_embd=32, n_layer=2, n_head=2, n_positions=256))
    else:
        sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
        model = NanochatForCausalLM(NanochatConfig(vocab_size=290, max_position_embeddings=256, **sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.mark.parametrize("kind", ["nanochat", "gpt2"])
def test_five_geometries_give_one_number(tokenizer, kind):
    model, sizes = make(kind), raw_token_bytes(tokenizer)
    nats = count = 0
    with torch.no_grad():  # the plain way: every text alone
        for text in TEXTS:
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
            logp = model(ids).logits[0].double().log_softmax(-1)
            nats -= sum(logp[t, i].item() for t, i in enumerate(ids[0, 1:]))
            count += len(text.encode())
    expected, values = nats / math.log(2) / count, []
    for tokens, world, positions in ((1, 1, 128), (512, 1, 128), (8192, 1, 200), (256, 2, 128), (300, 3, 256)):
        sums = []

        def reduce(tensor, sums=sums):
            sums.append(tensor)
            return torch.stack(sums).sum(0)  # the last rank sees the sum of all

        for rank in range(world):
            batches = text_batches(
                TEXTS, tokenizer, batch_tokens=tokens, positions=positions, rank=rank, world_size=world
            )
            value = evaluate_bpb(model, batches, sizes, reduce=reduce)
        values.append(value)
    assert values == pytest.approx([expected] * 5, rel=1e-6)


@pytest.mark.parametrize("kind", ["nanochat", "gpt2"])
@pytest.mark.parametrize("positions", [150, 256])
def test_packed_texts_give_the_number_of_texts_alone(tokenizer, kind, positions):
    model, sizes = make(kind), raw_token_bytes(tokenizer)
    documents = [[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)] for text in TEXTS]
    rows = plan_rows([len(d) for d in documents], positions + 1)
    assert len(rows) < len(documents) / 2, "several texts share a row"
    collate = PackingCollator(positions, tokenizer.pad_token_id)
    packed = [collate([[{"ids": documents[i], "mask": [1] * len(documents[i])} for i in row] for row in rows])]
    alone = text_batches(TEXTS, tokenizer, positions=256)
    assert evaluate_bpb(model, packed, sizes) == pytest.approx(evaluate_bpb(model, alone, sizes), rel=1e-6)


def test_chunks_of_logits_do_not_change_the_number(tokenizer, monkeypatch):
    model, sizes, shapes = make("nanochat"), raw_token_bytes(tokenizer), []
    whole = evaluate_bpb(model, text_batches(TEXTS, tokenizer, positions=128), sizes)
    monkeypatch.setattr("nanochat_hf.evals.bpb.CHUNK", 7)
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: shapes.append(len(hidden)) or logits(hidden))
    assert evaluate_bpb(model, text_batches(TEXTS, tokenizer, positions=128), sizes) == pytest.approx(whole, rel=1e-6)
    assert max(shapes) == 7, "no more logits than a chunk exist at one time"


def test_a_head_that_is_not_the_whole_story_is_noticed(tokenizer):
    gpt2 = make("gpt2")
    assert Scorer(gpt2).head is not None
    expected = evaluate_bpb(gpt2, text_batches(TEXTS, tokenizer, positions=128), raw_token_bytes(tokenizer))
    forward = gpt2.forward

    def doubled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    gpt2.forward = doubled
    assert Scorer(gpt2).head is None
    assert evaluate_bpb(
        gpt2, text_batches(TEXTS, tokenizer, positions=128), raw_token_bytes(tokenizer)
    ) != pytest.approx(expected, rel=1e-3)


def test_long_texts_are_split_and_nothing_is_lost(tokenizer):
    sizes = raw_token_bytes(tokenizer)
    for positions in (8, 33):
        batches = list(text_batches(TEXTS, tokenizer, batch_tokens=100, positions=positions))
        assert sum(sizes[b["shift_labels"][b["shift_labels"] >= 0]].sum().item() for b in batches) == sum(
            len(t.encode()) for t in TEXTS
        )
        assert all(
            b["input_ids"].shape[1] <= positions and (b["input_ids"][:, 0] == tokenizer.bos_token_id).all()
            for b in batches
        )


def test_no_bytes_is_infinite(tokenizer):
    assert evaluate_bpb(make("nanochat"), [], raw_token_bytes(tokenizer)) == math.inf


def test_byte_level_sizes_are_those_of_our_own_tokenizer(tokenizer):
    assert torch.equal(raw_token_bytes(tokenizer), token_bytes(tokenizer))


def test_gpt2_sizes_add_up_to_the_text(tmp_path):
    if not GPT2.exists():
        pytest.skip(f"no GPT-2 vocabulary at {GPT2}")
    vocabulary = json.loads(gzip.decompress((GPT2 / "encoder.json.gz").read_bytes()))
    lines = gzip.decompress((GPT2 / "vocab.bpe.gz").read_bytes()).decode().splitlines()[1:]
    merges = [tuple(line.split()) for line in lines if line]
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("bpb")
    make("gpt2").save_pretrained(path / "gpt2")
    tokenizer.save_pretrained(path / "gpt2")
    (path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return path


def test_script_takes_any_causal_model(folder):
    run = ["--model", str(folder / "gpt2"), "--eval", "bpb", "--data", str(folder / "texts.jsonl")]
    small, large = (
        main([*run, "--batch-tokens", str(n), "--output", str(folder / f"{n}.json")])["bpb"] for n in (1, 8192)
    )
    assert small == pytest.approx(large, rel=1e-6)
    assert json.loads((folder / "1.json").read_text())["bpb"] == small


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--eval", "bpb"], "needs --data"),
        (["--eval", "bpb", "--data", "none.jsonl"], "no such file"),
        (["--eval", "cores"], "cores is unknown"),
        (["--eval", "bpb", "--data", "x.jsonl", "--max-texts", "0"], "--max-texts 0"),
    ],
)
def test_wrong_arguments_end_before_the_model_is_loaded(arguments, reason, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--model", "no such model", *arguments])
    assert stop.value.code == 2 and reason in capsys.readouterr().err
