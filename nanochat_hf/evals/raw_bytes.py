"""How many bytes of text each token stands for, for byte-level BPE, SentencePiece and byte fallback."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "▁"  # how SentencePiece writes a space


def raw_token_bytes(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Bytes of each token's raw text, 0 for special tokens: LongTensor (V,).

    "Ġcat" of a byte-level tokenizer has 4 bytes, SentencePiece's "▁cat" has 4 and "<0xF0>" 1. Decoding a token would
    miscount those that hold part of a character. Raises ValueError for a tokenizer whose tokens do not keep the text's
    bytes (WordPiece, whole words): bits per byte would have no meaning.
    """
    vocabulary = tokenizer.get_vocab()
    sizes = torch.zeros(max(len(tokenizer), 1 + max(vocabulary.values())), dtype=torch.long)
    added = tokenizer.added_tokens_decoder
    count = _counter(tokenizer)
    for token, i in vocabulary.items():
        if i in added:  # literal text, unless special
            sizes[i] = 0 if added[i].special else len(added[i].content.encode())
        else:
            sizes[i] = count(token)
    sizes[list(tokenizer.all_special_ids)] = 0
    return sizes


def _counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    # a function from a token to its bytes, chosen by what the tokenizer says about itself
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        if hasattr(tokenizer, "sp_model"):
            return _sentencepiece
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell the bytes of its tokens; use a fast tokenizer (tokenizer.json)"
        )
    parts = json.loads(backend.to_str())
    kinds = set(_kinds(parts["pre_tokenizer"])) | set(_kinds(parts["decoder"]))
    if "ByteLevel" in kinds:
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        # each letter of the alphabet is a byte; a token with other letters was added as text
        return lambda token: len(token) if alphabet.issuperset(token) else len(token.encode())
    if kinds & {"Metaspace", "ByteFallback"} or parts["model"].get("byte_fallback"):
        return _sentencepiece
    raise ValueError(
        f"the tokenizer ({parts['model']['type']}) is neither byte-level nor SentencePiece's kind, so its tokens do "
        "not tell how many bytes of the text they stand for; bits per byte needs one that does"
    )


def _kinds(node: Any) -> Iterator[str | None]:
    # the types of a pre-tokenizer or decoder, and of all inside it
    if isinstance(node, dict):
        yield node.get("type")
        for children in ("pretokenizers", "decoders"):
            for child in node.get(children, ()):
                yield from _kinds(child)


def _sentencepiece(token: str) -> int:
    return 1 if BYTE.fullmatch(token) else len(token.replace(SPACE, " ").encode())
