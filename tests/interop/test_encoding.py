"""An imported tokenizer says what tiktoken says: on a whole shard of real text, and on random bytes and Unicode."""

import base64
import gzip
import random
from pathlib import Path

import pytest
import tiktoken

from nanochat_hf.conversation import SPECIAL_TOKENS
from nanochat_hf.interop.encoding import tokenizer_from_encoding
from nanochat_hf.tokenizer import SPLIT_PATTERN

DATA = Path(__file__).parents[3] / "shared" / "data"
RANKS, SHARD = DATA / "tokenizers" / "openai" / "cl100k_base.tiktoken.gz", DATA / "pretrain" / "shard_00007.parquet"
SIZE = 32768

pytestmark = pytest.mark.skipif(not (RANKS.is_file() and SHARD.is_file()), reason=f"needs {RANKS} and {SHARD}")


@pytest.fixture(scope="module")
def pair():
    """tiktoken's encoding of nanochat's size and pattern over the first ranks of cl100k, and ours made from it."""
    lines = gzip.decompress(RANKS.read_bytes()).split(b"\n")[: SIZE - len(SPECIAL_TOKENS)]
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    specials = {t: len(ranks) + i for i, t in enumerate(SPECIAL_TOKENS)}
    parts = dict(pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    tokenizer = tokenizer_from_encoding({"name": "rustbpe", **parts})
    tokenizer.backend_tokenizer.encode_special_tokens = True
    return tiktoken.Encoding("rustbpe", **parts), tokenizer


def same(pair, texts):
    encoding, tokenizer = pair
    for start in range(0, len(texts), 64):
        part = texts[start : start + 64]
        ours = [e.ids for e in tokenizer.backend_tokenizer.encode_batch(part, add_special_tokens=False)]
        for text, own, expected in zip(part, ours, encoding.encode_ordinary_batch(part, num_threads=1), strict=True):
            assert own == expected, text[:200]
            assert tokenizer.decode(own) == text


@pytest.mark.parametrize("stride", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_on_a_real_shard_sampled_and_whole(pair, stride):
    import pyarrow.parquet as parquet

    texts = parquet.read_table(SHARD, columns=["text"])["text"].to_pylist()
    assert sum(len(t.encode()) for t in texts) > 7e6
    same(pair, texts[::stride])


def test_on_random_bytes_and_unicode(pair):
    generator = random.Random(0)
    planes = [
        range(0x80),
        range(0x800),
        range(0xD800),
        range(0x10000, 0x11000),
        range(0x1F300, 0x1FB00),
        range(0xE000, 0x110000),
    ]
    texts = [
        "".join(chr(generator.choice(generator.choice(planes))) for _ in range(generator.randint(0, 300)))
        for _ in range(300)
    ]
    # bytes as Latin-1 letters, and with what is not UTF-8 replaced: no str holds invalid UTF-8
    noise = [generator.randbytes(generator.randint(0, 300)) for _ in range(300)]
    same(
        pair,
        texts + [b.decode("latin-1") for b in noise] + [b.decode("utf-8", "replace") for b in noise] + SPECIAL_TOKENS,
    )
