"""Train a tokenizer: python -m scripts.tok_train --data 'text/*.parquet' --vocab-size 8192 --output runs/tokenizer"""

from dataclasses import dataclass, field

from nanochat_hf.config import parse, user_errors
from nanochat_hf.data import SourceConfig, load_source
from nanochat_hf.tokenizer import train_tokenizer


@dataclass(frozen=True)
class TokenizerConfig:
    """What to train on, and how large."""

    data: str = field(metadata={"help": "a Hub name, a file, or a pattern of files (json, jsonl, parquet, csv)"})
    output: str = field(metadata={"help": "folder to write the tokenizer to"})
    vocab_size: int = field(default=32768, metadata={"help": "tokens, the 9 special ones among them"})
    split: str = field(default="train", metadata={"help": "split, for a Hub name"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    max_chars: int | None = field(default=None, metadata={"help": "stop after so many characters"})
    document_chars: int = field(default=10_000, metadata={"help": "read at most so many characters of a document"})


@user_errors
def main(argv=None):
    config, _ = parse([TokenizerConfig], argv, description=__doc__)
    rows = load_source(SourceConfig(path=config.data, split=config.split))
    if config.text_column not in rows[0]:
        raise ValueError(f"{config.data}: no column {config.text_column!r}; it has {', '.join(rows[0])}")
    tokenizer = train_tokenizer(texts(rows, config), config.vocab_size, progress=True)
    tokenizer.save_pretrained(config.output)
    print(f"tokenizer of {len(tokenizer)} tokens saved in {config.output}")


def texts(rows, config):
    """The documents, each cut to document_chars, until max_chars."""
    total = 0
    for row in rows:
        text = row[config.text_column][: config.document_chars]
        total += len(text)
        yield text
        if config.max_chars and total >= config.max_chars:
            return


if __name__ == "__main__":
    main()
