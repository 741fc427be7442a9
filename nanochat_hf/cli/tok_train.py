"""Train a tokenizer: python -m scripts.tok_train --data 'text/*.parquet' --vocab-size 8192 --output runs/tokenizer"""

import time
from dataclasses import dataclass, field

from tqdm import tqdm

from nanochat_hf.config import parse, user_errors
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.data.texts import check_column, documents, is_remote, load_rows
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

    def __post_init__(self):
        for name in ("max_chars", "document_chars", "model_max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1".replace("_", "-"))


@user_errors
def main(argv=None):
    config, _ = parse([TokenizerConfig], argv, description=__doc__)
    source, start = SourceConfig(path=config.data, split=config.split), time.perf_counter()
    streaming = is_remote(source) if config.streaming is None else config.streaming
    # the reference trains on two billion characters; a stream of the Hub's would go on for days
    limit = config.max_chars or (2_000_000_000 if streaming else None)
    rows = load_rows(source, streaming, config.text_column)
    check_column(rows, config.text_column, config.data)
    texts = documents(rows, config.text_column, config.document_chars, limit)
    read = Counted(texts, limit)
    tokenizer = train_tokenizer(read, config.vocab_size, config.model_max_length, progress=True)
    tokenizer.save_pretrained(config.output)
    print(
        f"tokenizer of {len(tokenizer)} tokens from {read.documents:,} documents, {read.characters:,} characters, "
        f"in {time.perf_counter() - start:.0f} s, saved in {config.output}"
    )


class Counted:
    """The texts of an iterable, counted as they pass, with a bar of characters; `limit` is where the bar ends."""

    def __init__(self, texts, limit):
        self.texts, self.limit, self.documents, self.characters = texts, limit, 0, 0

    def __iter__(self):
        with tqdm(total=self.limit, desc="reading", unit="char", unit_scale=True) as bar:
            for text in self.texts:
                self.documents, self.characters = self.documents + 1, self.characters + len(text)
                bar.update(len(text))
                yield text


if __name__ == "__main__":
    main()
