"""Byte-level BPE with nanochat's split pattern and special tokens, as a PreTrainedTokenizerFast."""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .conversation import CHAT_TEMPLATE, RESPONSE_TEMPLATE, SPECIAL_TOKENS

# GPT-4's pattern with at most two digits together: small vocabularies cannot afford a thousand numbers
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_length: int = 2048, progress: bool = False
) -> PreTrainedTokenizerFast:
    """Train on texts; the special tokens take the last 9 of `vocab_size` ids. `max_length` becomes model_max_length.

    The same texts in the same order give the same tokenizer, on any number of threads. ValueError below 265 or with too
    little text.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is smaller than 256 bytes + {len(SPECIAL_TOKENS)} special tokens; "
            f"use at least {smallest}"
        )
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"), byte_level]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() != vocab_size - len(SPECIAL_TOKENS):
        found = backend.get_vocab_size() + len(SPECIAL_TOKENS)
        raise ValueError(
            f"the text yields only {found} tokens of vocab_size={vocab_size}; give more text or a smaller size"
        )
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return as_transformers(backend, max_length)


def as_transformers(backend: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer with nanochat's special tokens as transformers takes it, with both templates.

    Texts begin with <|bos|>, as every document in training does; chat templates write it themselves, and transformers
    adds none to them. Padding is on the left, where generation needs it.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|assistant_end|>",
        pad_token="<|output_end|>",
        add_bos_token=True,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    return with_templates(tokenizer)


def with_templates(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, with the chat template that agrees with `conversation.render`, and the one for answers."""
    tokenizer.chat_template, tokenizer.response_template = CHAT_TEMPLATE, RESPONSE_TEMPLATE
    return tokenizer


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """LongTensor (V,): length in bytes of each token's raw bytes, 0 for specials.

    A byte-level token has one letter for each byte, so tokens that are no whole character count too. A token that was
    added by hand is spelled in characters.
    """
    sizes = torch.zeros(len(tokenizer), dtype=torch.long)
    for token, i in tokenizer.get_vocab().items():
        sizes[i] = len(token)
    for i, token in tokenizer.added_tokens_decoder.items():
        sizes[i] = 0 if token.special else len(token.content.encode())
    return sizes


def load_tokenizer(folder: str | PathLike[str]) -> PreTrainedTokenizerFast:
    """The tokenizer saved in `folder` or under a Hub name; ValueError where it is missing or lacks the special tokens.

    It gets the templates of this version, since the trainer renders by them, whatever the folder was saved with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        inner = Path(folder) / "final"
        remedy = f"did you mean {inner}, the run's model?" if inner.is_dir() else "train one with scripts.tok_train"
        raise ValueError(f"tokenizer {folder}: cannot be loaded ({str(error).splitlines()[0]}); {remedy}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer {folder}: is no fast tokenizer; use one made by scripts.tok_train")
    missing = [t for t in SPECIAL_TOKENS if t not in tokenizer.get_vocab()]
    if missing:
        raise ValueError(f"tokenizer {folder}: lacks {', '.join(missing)}; use one made by scripts.tok_train")
    return with_templates(tokenizer)
