"""Bytes per token on several kinds of text, beside other tokenizers.

python -m scripts.tok_eval --tokenizer DIR [--data FILES]
"""

import base64
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nanochat_hf.config import parse, user_errors
from nanochat_hf.data.loading import is_remote
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.data.texts import Texts, shortened

from .tok_eval_texts import TEXTS

LOCAL = ("../shared/data/tokenizers/gpt2", "../shared/data/tokenizers/openai/cl100k_base.tiktoken.gz")
# the split pattern of GPT-4, which a .tiktoken file does not hold
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)

# from texts to the number of tokens of each, and the size of the vocabulary
Encoder = tuple[Callable[[list[str]], list[int]], int]
Measured = tuple[str, int, list[float]]  # as `measure` returns it


@dataclass(frozen=True)
class EvalConfig:
    """The tokenizers to compare, and the texts."""

    tokenizer: str = field(metadata={"help": "folder or Hub name of the tokenizer"})
    versus: list[str] | None = field(
        default=None,
        metadata={
            "help": "others: a folder with encoder.json and vocab.bpe (GPT-2's files, also .gz), "
            "cl100k_base.tiktoken[.gz], a folder or Hub name of transformers' (default: gpt2 and cl100k of "
            "../shared/data/tokenizers, where they are)"
        },
    )
    data: list[str] = field(
        default_factory=list, metadata={"help": "text to measure on too: Hub names, files or patterns of files"}
    )
    split: str = field(default="train", metadata={"help": "split, for Hub names"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    max_chars: int = field(default=2_000_000, metadata={"help": "characters to read of each --data"})

    def __post_init__(self) -> None:
        if self.max_chars < 1:
            raise ValueError(f"--max-chars {self.max_chars} must be at least 1")


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Load the tokenizers, measure, print a table."""
    config, _ = parse([EvalConfig], argv, description=__doc__)
    versus = [path for path in LOCAL if Path(path).exists()] if config.versus is None else config.versus
    encoders = dict(load(path) for path in [config.tokenizer, *versus])
    texts = {kind: [text] for kind, text in TEXTS.items()} | {path: read(path, config) for path in config.data}
    table(
        [measure(kind, parts, encoders) for kind, parts in texts.items()],
        {name: size for name, (_, size) in encoders.items()},
    )


def read(path: str, config: EvalConfig) -> list[str]:
    """The documents of one --data."""
    source = SourceConfig(path=path, split=config.split)
    texts = Texts(source, config.text_column, streaming=is_remote(source))
    return list(shortened(texts, max_chars=config.max_chars))


def measure(kind: str, texts: list[str], encoders: Mapping[str, Encoder]) -> Measured:
    """The kind, the bytes of the texts, and their bytes per token with each encoder."""
    size = sum(len(text.encode()) for text in texts)
    return kind, size, [size / max(1, sum(encode(texts))) for encode, _ in encoders.values()]


def load(path: str) -> tuple[str, Encoder]:
    """A path or Hub name → the tokenizer's name, and the tokenizer; ValueError says what is missing."""
    place = Path(path)
    if ".tiktoken" in place.suffixes:
        return place.name.split(".")[0], tiktoken_file(place)
    vocab, merges = (
        next((f for f in (place / name, place / f"{name}.gz") if f.is_file()), None)
        for name in ("encoder.json", "vocab.bpe")
    )
    if vocab and merges:
        return place.name, counting(gpt2(vocab, merges))
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer {path}: cannot be loaded ({str(error).splitlines()[0]}); give a folder or a Hub name"
        ) from None
    # AutoTokenizer is declared to return None too, and slow tokenizers; here it raises instead
    return place.name or path, counting(tokenizer.backend_tokenizer)  # ty: ignore[missing-union-attribute]


def counting(backend: Tokenizer) -> Encoder:
    """A tokenizer of the tokenizers library as an `Encoder`."""

    def count(texts: list[str]) -> list[int]:
        return [len(e.ids) for e in backend.encode_batch_fast(texts, add_special_tokens=False)]

    return count, backend.get_vocab_size()


def gpt2(vocab: Path, merges: Path) -> Tokenizer:
    """The tokenizer in GPT-2's two files."""
    lines = opened(merges).decode().splitlines()
    pairs = [(a, b) for a, b in (line.split() for line in lines if line and not line.startswith("#version"))]
    backend = Tokenizer(models.BPE(json.loads(opened(vocab)), pairs))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return backend


def tiktoken_file(path: Path) -> Encoder:
    """cl100k_base.tiktoken, where each line holds a token in base64 and its rank.

    Raises ValueError for another file, and where tiktoken is not installed.
    """
    if not path.name.startswith("cl100k_base"):
        raise ValueError(
            f"{path}: only cl100k_base.tiktoken is known, since the file does not hold its split pattern; give that one"
        )
    try:
        import tiktoken
    except ImportError:
        raise ValueError(
            f"{path}: reading it needs tiktoken; pip install tiktoken, or leave it out of --versus"
        ) from None
    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in opened(path).splitlines() if line)
    }
    encoding = tiktoken.Encoding("cl100k_base", pat_str=CL100K, mergeable_ranks=ranks, special_tokens={})
    return lambda texts: [len(ids) for ids in encoding.encode_ordinary_batch(texts)], encoding.n_vocab


def opened(path: Path) -> bytes:
    """The bytes of a file, unpacked where its name ends in .gz; ValueError where there is none."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); give an existing file") from None


def table(rows: Sequence[Measured], vocabularies: Mapping[str, int]) -> None:
    """Print the bytes per token of each kind of text with each tokenizer.

    In brackets: how many more bytes a token of the first tokenizer holds than a token of this one.
    """
    head = ["bytes per token", "bytes", *(f"{name} ({size:,})" for name, size in vocabularies.items())]
    lines = [head] + [
        [kind, f"{size:,}", f"{own:.3f}", *(f"{other:.3f} ({own / other - 1:+.1%})" for other in others)]
        for kind, size, (own, *others) in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for number, line in enumerate(lines):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
        if not number:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


if __name__ == "__main__":
    main()
