"""Text and words that every installation holds: the docstrings of the standard library, torch and transformers."""

import ast
import gzip
import json
import re
import sysconfig
import warnings
import zlib
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub.constants import HF_HOME
from tqdm import tqdm


@cache
def docstring_corpus():
    """Deduplicated docstrings of 200 characters or more, a list of str; parsed once (about half a minute) and cached on disk."""
    import sys

    import torch
    import transformers

    version = f"{sys.version_info[0]}.{sys.version_info[1]}-{torch.__version__}-{transformers.__version__}"
    path = Path(HF_HOME) / "nanochat_hf" / f"docstrings-{version}.json"
    if path.is_file():
        return json.loads(path.read_text())
    roots = [
        Path(sysconfig.get_paths()["stdlib"]),
        *(Path(find_spec(n).origin).parent for n in ("torch", "transformers")),
    ]
    files = [
        f for root in roots for f in sorted(root.rglob("*.py")) if root != roots[0] or "site-packages" not in f.parts
    ]
    texts = dict.fromkeys(t for f in tqdm(files, desc="embedded text", unit="file") for t in docstrings(f))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(list(texts)))
    partial.rename(path)
    return list(texts)


def docstrings(path, shortest=200):
    """The docstrings of a Python file; none where it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text and len(text) >= shortest]


@cache
def words(split):
    """Lower-case words of 3 to 12 letters that occur twice or more, shuffled stably; a tenth of them is "test", the rest "train"."""
    counts = Counter(w for text in docstring_corpus() for w in re.findall(r"(?<![\w])[a-z]{3,12}(?![\w])", text))
    return share(split, (w for w, n in counts.items() if n >= 2))


def share(split, found):
    """The words of a split, shuffled stably: a tenth of any list is "test", the rest "train", each word by itself."""
    return [
        w
        for w in sorted(found, key=lambda w: zlib.crc32(w.encode()))
        if (zlib.crc32(w[::-1].encode()) % 10 == 0) == (split == "test")
    ]


@cache
def listed_words(path, split):
    """Those of a text file (.txt or .txt.gz) with one word a line; ValueError where it holds none.

    The 370 K English words that nanochat takes are words_alpha.txt of https://github.com/dwyl/english-words.
    """
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            found = {line.strip().lower() for line in file}
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"word list {path}: cannot be read ({error}); give a text file with one word a line") from None
    found = share(split, (w for w in found if w.isalpha()))
    if not found:
        raise ValueError(f"word list {path}: no words for split {split}; give a text file with one word a line")
    return found
