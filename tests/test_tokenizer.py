"""The tokenizer: what its folder keeps, how it splits, and what of other folders is refused."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nanochat_hf.cli import tok_eval, tok_train
from nanochat_hf.conversation import CHAT_TEMPLATE, RESPONSE_TEMPLATE, SPECIAL_TOKENS, PlainEncoder, render_prompt
from nanochat_hf.data.texts import shortened
from nanochat_hf.interop.encoding import BYTES
from nanochat_hf.tokenizer import load_tokenizer, token_bytes, train_tokenizer

BASELINES = Path(__file__).parents[2] / "shared" / "data" / "tokenizers"

TEXT = ["It's 2026, and we'll count 123456 words; naïve café 🙂 in two lines.\r\n\r\nAnd   spaces."] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT, 290, max_length=512)


def test_specials_take_the_last_ids_in_order_and_serve_as_bos_eos_pad(tokenizer):
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == list(range(281, 290)) and len(tokenizer) == 290
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == [
        "<|bos|>",
        "<|assistant_end|>",
        "<|output_end|>",
    ]


def test_a_saved_folder_loads_as_it_was(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for again in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert (
            again.get_vocab() == tokenizer.get_vocab()
            and again.model_max_length == 512
            and again.chat_template == CHAT_TEMPLATE
        )
        assert again(TEXT[0])["input_ids"] == tokenizer(TEXT[0])["input_ids"]
        assert again.response_template == RESPONSE_TEMPLATE
        assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (281, 285, 289)


def test_texts_begin_with_bos_once_and_are_padded_on_the_left(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for again in (tokenizer, load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        bos, pad, bare = 281, 289, again("and", add_special_tokens=False)["input_ids"]
        assert again("and")["input_ids"] == again.encode("and") == [bos, *bare]
        rows = again(["and", "and And"], padding=True)["input_ids"]
        assert rows[0] == [pad] * (len(rows[1]) - 1 - len(bare)) + [bos, *bare] and rows[1][0] == bos
        chat = [{"role": "user", "content": "and"}]
        said = again.apply_chat_template(chat, return_dict=True, add_generation_prompt=True)["input_ids"]
        assert said.count(bos) == 1 and said == render_prompt(again, {"messages": chat})
        assert PlainEncoder(again).encode(["and"]) == [bare], "the trainer adds its own bos"


def test_a_folder_of_an_older_version_gets_the_templates_by_which_it_is_rendered(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("old")
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "old"
    assert load_tokenizer(tmp_path).chat_template == CHAT_TEMPLATE


def test_the_pattern_keeps_two_digits_words_and_line_ends_apart(tokenizer):
    def pieces(text):
        return ["".join(text[a:b]) for _, (a, b) in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    assert pieces("12345") == ["12", "34", "5"]
    assert pieces("it's we'LL") == ["it", "'s", " we", "'LL"]
    assert pieces("a  b\n\nc !?\n") == ["a", " ", " b", "\n\n", "c", " !?\n"]


def test_token_bytes_counts_raw_bytes_of_invalid_utf8_too(tokenizer):
    sizes = token_bytes(tokenizer)
    assert sizes.shape == (290,) and (sizes[:256] == 1).all() and (sizes[281:] == 0).all()
    merges = tokenizer.convert_ids_to_tokens(list(range(256, 281)))
    assert sizes[256:281].tolist() == [len(m) for m in merges] and min(map(len, merges)) > 1


def test_same_text_same_tokenizer():
    assert (
        train_tokenizer(TEXT, 280).backend_tokenizer.to_str() == train_tokenizer(TEXT, 280).backend_tokenizer.to_str()
    )


def test_too_little_text_and_foreign_folders_say_why(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="yields only .* of vocab_size=5000; give more text"):
        train_tokenizer(TEXT, 5000)
    with pytest.raises(ValueError, match="none: cannot be loaded.*scripts.tok_train"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "other").mkdir()
    foreign = PreTrainedTokenizerFast(tokenizer_object=_without_specials(tokenizer))
    foreign.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other: lacks <\|bos\|>"):
        load_tokenizer(tmp_path / "other")


def _without_specials(tokenizer):
    import json

    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | {"added_tokens": []}))


def raw(tokenizer, ids):
    """The bytes that tokens stand for."""
    return [bytes(BYTES[letter] for letter in token) for token in tokenizer.convert_ids_to_tokens(ids)]


@settings(max_examples=80, deadline=None)
@given(st.one_of(st.text(max_size=80), st.binary(max_size=80).map(lambda data: data.decode("latin-1"))))
def test_any_text_comes_back_and_its_tokens_are_its_bytes(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert b"".join(raw(tokenizer, ids)) == text.encode() and token_bytes(tokenizer)[ids].tolist() == [
        len(b) for b in raw(tokenizer, ids)
    ]
    assert tokenizer.decode(ids) == text


@given(st.binary(max_size=40))
def test_any_bytes_have_tokens(tokenizer, data):
    """Bytes that are no UTF-8 have no string to encode, but each byte is a token.

    So they have ids, and decoding replaces what is no text.
    """
    single = {b[0]: i for i, b in enumerate(raw(tokenizer, list(range(281)))) if len(b) == 1}
    assert len(single) == 256
    ids = [single[b] for b in data]
    assert b"".join(raw(tokenizer, ids)) == data and tokenizer.decode(ids) == data.decode("utf-8", "replace")


def test_another_process_trains_and_encodes_alike():
    """With another hash seed and with threads, where this process has none (conftest.py)."""
    code = """
import random, sys
sys.path.insert(0, {root!r})
from nanochat_hf.tokenizer import train_tokenizer
dice = random.Random(0)
texts = ["".join(dice.choice("abcdefgh é1\\n") for _ in range(60)) for _ in range(300)]
tokenizer = train_tokenizer(texts, 320)
made = (tokenizer.backend_tokenizer.to_str(), tokenizer(texts)["input_ids"])
"""
    code = code.format(root=str(Path(__file__).parents[1]))
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "true"}
    other = subprocess.run(
        [sys.executable, "-c", code + "print(repr(made))"], env=environment, capture_output=True, text=True
    )
    assert other.returncode == 0, other.stderr
    here = {}
    exec(code, here)
    assert other.stdout.strip() == repr(here["made"]) and len(here["made"][1]) == 300


def test_documents_are_cut_and_capped():
    assert list(shortened(["abcd", "ef", "g"], 3, 4)) == ["abc", "e"]
    assert list(shortened(["abcd", "ef"])) == ["abcd", "ef"]


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_training_reads_streams_and_files_alike(tmp_path, capsys, streaming):
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} cats and {i * i} dogs " * 5}) + "\n" for i in range(200))
    )
    flags = [
        "--data",
        str(tmp_path / "t.jsonl"),
        "--vocab-size",
        "300",
        "--output",
        str(tmp_path / "out"),
        "--streaming",
        streaming,
    ]
    tok_train.main([*flags, "--max-chars", "5000", "--document-chars", "50", "--model-max-length", "77"])
    assert "300 tokens from 100 documents, 5,000 characters" in capsys.readouterr().out
    expected = train_tokenizer([(f"{i} cats and {i * i} dogs " * 5)[:50] for i in range(100)], 300, 77)
    made = load_tokenizer(tmp_path / "out")
    assert made.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str() and made.model_max_length == 77
    with pytest.raises(SystemExit):
        tok_train.main([*flags, "--text-column", "body"])
    assert "no column 'body'; it has text" in capsys.readouterr().err


def rows(out):
    return {
        line[0]: line[1:]
        for line in (
            [c.strip() for c in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")
        )
    }


def test_compression_is_bytes_over_tokens(tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "own")
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": TEXT[0]}) + "\n")
    gpt2 = tmp_path / "plain"  # GPT-2's files with no merge but one
    gpt2.mkdir()
    (gpt2 / "encoder.json").write_text(json.dumps({letter: i for i, letter in enumerate(BYTES)} | {"an": 256}))
    with gzip.open(gpt2 / "vocab.bpe.gz", "wt") as file:
        file.write("#version: 0.2\na n\n")
    tok_eval.main(["--tokenizer", str(tmp_path / "own"), "--versus", str(gpt2), "--data", str(tmp_path / "t.jsonl")])
    table = rows(capsys.readouterr().out)
    size, ours = len(TEXT[0].encode()), len(tokenizer(TEXT[0], add_special_tokens=False)["input_ids"])
    theirs = size - TEXT[0].count("an")
    assert table[str(tmp_path / "t.jsonl")] == [
        str(size),
        f"{size / ours:.3f}",
        f"{size / theirs:.3f} ({theirs / ours - 1:+.1%})",
    ]
    assert {"news", "code", "mathematics", "German", "Chinese"} <= set(table)
    with pytest.raises(SystemExit):
        tok_eval.main(["--tokenizer", str(tmp_path / "own"), "--versus", str(tmp_path / "o200k_base.tiktoken")])
    assert "only cl100k_base.tiktoken is known" in capsys.readouterr().err


@pytest.mark.skipif(not BASELINES.is_dir(), reason="../shared/data/tokenizers is not here")
def test_gpt2_and_cl100k_compress_as_published():
    """Bytes per token on the last shard of the pretraining text, as its README says: gpt2 4.255, cl100k 4.624."""
    pytest.importorskip("tiktoken")
    from pyarrow import parquet

    file = parquet.ParquetFile(BASELINES.parent / "pretrain" / "shard_00007.parquet")
    texts = file.read(columns=["text"])["text"].to_pylist()
    encoders = dict(
        tok_eval.load(str(path)) for path in (BASELINES / "gpt2", BASELINES / "openai" / "cl100k_base.tiktoken.gz")
    )
    _, _, ratios = tok_eval.measure("shard 7", texts, encoders)
    assert [round(ratio, 3) for ratio in ratios] == [4.255, 4.624]
