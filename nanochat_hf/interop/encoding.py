"""nanochat's tokenizer.pkl, a pickled tiktoken.Encoding ↔ a fast tokenizer.

Reading needs no tiktoken and runs no code from the file.
"""

import json
import pickle
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..conversation import SPECIAL_TOKENS
from ..tokenizer import as_transformers, token_bytes

# Byte-level tokens spell each byte as one letter (GPT-2). A printable byte of Latin-1 is its own letter; the other 68
# bytes get the letters from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {b: chr(b) for b in _PRINTABLE} | {
    b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)
}
# what a quantifier stands behind: an escape with its property, a class, an operator of an open group, any character
ATOM = re.compile(r"\\[pP]\{[^}]*\}|\\.|\[\^?\]?(?:\\.|\[:\w+:\]|[^\]\\])*\]|.", re.DOTALL)
BYTES = {letter: byte for byte, letter in LETTERS.items()}


class Encoding(TypedDict):
    """The arguments of tiktoken.Encoding."""

    name: str
    pat_str: str
    mergeable_ranks: dict[bytes, int]
    special_tokens: dict[str, int]


class _StandIn:
    """Stands in for tiktoken.core.Encoding when the pickle is read, and keeps its state as it is."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_StandIn]:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _StandIn
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_encoding(path: str | Path) -> Encoding:
    """tokenizer.pkl → its name, split pattern, ranks of byte strings, and special tokens with their ids.

    The pickle may name tiktoken.core.Encoding alone, and even that is not imported: no code of the file or of tiktoken
    runs. Raises ValueError for everything else.
    """
    try:
        with open(path, "rb") as file:
            found = _Unpickler(file).load()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise ValueError(f"{path}: not a pickled tiktoken.Encoding ({error}); give nanochat's tokenizer.pkl") from None
    state = getattr(found, "state", None) if isinstance(found, _StandIn) else None
    types = {"name": str, "pat_str": str, "mergeable_ranks": dict, "special_tokens": dict}
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in types.items()):
        raise ValueError(f"{path}: not a tiktoken.Encoding with ranks of its own; give nanochat's tokenizer.pkl")
    ranks, specials = state["mergeable_ranks"], state["special_tokens"]
    if not all(type(k) is bytes and k and type(v) is int for k, v in ranks.items()):
        raise ValueError(f"{path}: its ranks are not bytes with numbers; give nanochat's tokenizer.pkl")
    if not all(type(k) is str and type(v) is int for k, v in specials.items()):
        raise ValueError(f"{path}: its special tokens are not strings with numbers; give nanochat's tokenizer.pkl")
    if sorted([*ranks.values(), *specials.values()]) != list(range(len(ranks) + len(specials))):
        raise ValueError(f"{path}: its ids are not 0, 1, 2, … each once; a model cannot be laid out for it")
    missing = [t for t in SPECIAL_TOKENS if t not in specials] + [
        f"byte {b}" for b in range(256) if bytes([b]) not in ranks
    ]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing[:9])}; give nanochat's tokenizer.pkl")
    return Encoding(name=state["name"], pat_str=state["pat_str"], mergeable_ranks=ranks, special_tokens=specials)


def split_in_merging(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts of `token` that remain when only merges of a lower rank are made.

    There are two of them for every token that byte pair encoding made.

    >>> split_in_merging(b"abc", {b"ab": 256, b"abc": 257})
    [b'ab', b'c']
    """
    parts, limit = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, limit), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank >= limit:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def with_atomic_intervals(pattern: str) -> str:
    r"""A split pattern with each possessive interval as an atomic group, which means the same.

    tiktoken takes `{1,3}+` as possessive; the regular expressions of `tokenizers` take it as a repeated interval, and
    would make one piece of a long number.

    >>> with_atomic_intervals(r"\p{N}{1,3}+|[^\s]{2}+|a++")
    '(?>\\p{N}{1,3})|(?>[^\\s]{2})|a++'
    """
    made: list[str] = []  # atoms and operators so far; groups and classes as one atom each
    opened: list[int] = []  # where in `made` the groups begin
    at = 0
    while at < len(pattern):
        interval = re.compile(r"\{\d*,?\d*\}\+").match(pattern, at)
        if interval and made:
            made[-1] = f"(?>{made[-1]}{interval[0][:-1]})"
            at = interval.end()
            continue
        atom = ATOM.match(pattern, at)
        assert atom is not None  # its last alternative takes any character
        if atom[0] == ")" and opened:
            begin = opened.pop()
            made[begin:] = ["".join(made[begin:]) + ")"]
        else:
            if atom[0] == "(":
                opened.append(len(made))
            made.append(atom[0])
        at = atom.end()
    return "".join(made)


def tokenizer_from_encoding(encoding: Encoding, max_length: int = 2048) -> PreTrainedTokenizerFast:
    """An encoding of nanochat's → the fast tokenizer with the same ids.

    Raises ValueError where the ids cannot be kept, or the split pattern cannot be read.
    """
    ranks, ids = encoding["mergeable_ranks"], encoding["special_tokens"]
    spelled = {token: "".join(LETTERS[b] for b in token) for token in ranks}
    ordered = sorted((t for t in ranks if len(t) > 1), key=ranks.__getitem__)
    merges = [(split[0], split[1]) for t in ordered if len(split := split_in_merging(t, ranks)) == 2]
    # tiktoken takes a piece of text that is a token without merging; ignore_merges does the same
    model = models.BPE(
        {spelled[t]: i for t, i in ranks.items()}, [(spelled[a], spelled[b]) for a, b in merges], ignore_merges=True
    )
    backend = Tokenizer(model)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    try:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(with_atomic_intervals(encoding["pat_str"])), "isolated"), byte_level]
        )
    except Exception as error:
        raise ValueError(
            f"the tokenizer's split pattern cannot be read ({error}); give nanochat's tokenizer.pkl"
        ) from None
    backend.decoder = decoders.ByteLevel()
    specials = sorted(ids, key=ids.__getitem__)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    moved = [t for t in specials if backend.token_to_id(t) != ids[t]]
    if moved:
        raise ValueError(f"special token {moved[0]} has the id {ids[moved[0]]}; special ids must follow the merges")
    return as_transformers(backend, max_length)


def encoding_from_tokenizer(tokenizer: PreTrainedTokenizerFast, name: str = "rustbpe") -> Encoding:
    """A fast tokenizer → the arguments of tiktoken.Encoding.

    Raises ValueError where tiktoken would split or merge differently.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = (parts["pre_tokenizer"] or {}).get("pretokenizers", [])
    if parts["model"]["type"] != "BPE" or parts["normalizer"] or [s["type"] for s in steps] != ["Split", "ByteLevel"]:
        raise ValueError("the tokenizer is no byte-level BPE with a split pattern; use one made by scripts.tok_train")
    vocab = parts["model"]["vocab"]
    merged = list(dict.fromkeys(vocab["".join(pair)] for pair in parts["model"]["merges"]))
    if merged != sorted(merged):
        raise ValueError(
            "the tokenizer's ids do not follow its merges, so tiktoken would merge in another order; "
            "train one with tok_train"
        )
    specials = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ranks = {bytes(BYTES[letter] for letter in token): i for token, i in vocab.items() if token not in specials}
    return {"name": name, "pat_str": steps[0]["pattern"]["Regex"], "mergeable_ranks": ranks, "special_tokens": specials}


def write_encoding(
    tokenizer: PreTrainedTokenizerFast, folder: str | Path, name: str = "rustbpe", pattern: str | None = None
) -> None:
    """Write `folder/tokenizer.pkl` and `folder/token_bytes.pt` (int32, (V,)) as nanochat reads them.

    `pattern`: the split pattern as the original had it, where the tokenizer has the same with atomic groups.

    Raises ValueError where tiktoken is not installed, or would split or merge differently.
    """
    encoding = encoding_from_tokenizer(tokenizer, name)
    if pattern is not None and with_atomic_intervals(pattern) == encoding["pat_str"]:
        encoding["pat_str"] = pattern
    try:
        import tiktoken
    except ImportError:
        raise ValueError("writing tokenizer.pkl needs tiktoken; pip install tiktoken") from None
    with open(Path(folder) / "tokenizer.pkl", "wb") as file:
        pickle.dump(tiktoken.Encoding(**encoding), file)
    torch.save(token_bytes(tokenizer).int(), Path(folder) / "token_bytes.pt")
