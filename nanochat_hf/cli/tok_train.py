"""Train a tokenizer.

python -m scripts.tok_train --data 'text/*.parquet' --vocab-size 8192 --output runs/tokenizer
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from nanochat_hf.config import parse, user_errors
from nanochat_hf.data.loading import is_remote
from nanochat_hf.data.reports import DataReport, check_policy
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.data.texts import Texts, shortened
from nanochat_hf.tokenizer import train_tokenizer


@dataclass(frozen=True)
class TokenizerConfig:
    """What to train on, and how large."""

    data: str = field(
        metadata={"help": "a Hub name, a folder, a file, or a pattern of files (json, jsonl, parquet, csv)"}
    )
    output: str = field(metadata={"help": "folder to write the tokenizer to"})
    vocab_size: int = field(default=32768, metadata={"help": "tokens, the 9 special ones among them"})
    split: str = field(default="train", metadata={"help": "split, for a Hub name"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    bad_rows: str = field(
        default="error",
        metadata={"help": "rows without text: error, or skip, which leaves out and counts up to half of them"},
    )
    streaming: bool | None = field(
        default=None, metadata={"help": "read as a stream, without downloading first (default: the Hub's data, yes)"}
    )
    max_chars: int | None = field(
        default=None, metadata={"help": "stop after so many characters (default: all; of a stream 2 billion)"}
    )
    document_chars: int = field(default=10_000, metadata={"help": "read at most so many characters of a document"})
    model_max_length: int = field(
        default=2048, metadata={"help": "tokens beyond which users of the tokenizer are warned"}
    )

    def __post_init__(self) -> None:
        check_policy(self.bad_rows)
        for name in ("max_chars", "document_chars", "model_max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1".replace("_", "-"))


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Read, train, save."""
    config, _ = parse([TokenizerConfig], argv, description=__doc__)
    source, start = SourceConfig(path=config.data, split=config.split), time.perf_counter()
    streaming = is_remote(source) if config.streaming is None else config.streaming
    # the reference trains on two billion characters; a stream of the Hub's would go on for days
    limit = config.max_chars or (2_000_000_000 if streaming else None)
    texts = Texts(source, config.text_column, streaming=streaming, bad_rows=config.bad_rows)
    read = Counted(shortened(texts, config.document_chars, limit), limit)
    tokenizer = train_tokenizer(read, config.vocab_size, config.model_max_length, progress=True)
    tokenizer.save_pretrained(config.output)
    print(
        f"tokenizer of {len(tokenizer)} tokens from {read.documents:,} documents, {read.characters:,} characters, "
        f"in {time.perf_counter() - start:.0f} s, saved in {config.output}"
    )
    if left_out := DataReport([texts.report]).left_out:
        print(f"left out: {left_out}")


class Counted:
    """The texts of an iterable, counted as they pass, with a bar of characters; `limit` is where the bar ends."""

    def __init__(self, texts: Iterable[str], limit: int | None) -> None:
        self.texts, self.limit, self.documents, self.characters = texts, limit, 0, 0

    def __iter__(self) -> Iterator[str]:
        with tqdm(total=self.limit, desc="reading", unit="char", unit_scale=True) as bar:
            for text in self.texts:
                self.documents, self.characters = self.documents + 1, self.characters + len(text)
                bar.update(len(text))
                yield text


if __name__ == "__main__":
    main()
