"""Text and words that every installation holds: the docstrings of the standard library, torch and transformers."""

import contextlib
import gzip
import inspect
import json
import os
import re
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
import transformers
from huggingface_hub.constants import HF_HOME

SHORTEST = 200  # characters of a docstring that counts as text
# A string in triple quotes at the start of a file or after a line that ends in a colon. Parsing the 6,900 files took
# 95 s on a core that
# searches them in 5 s; on those files the two differ in one docstring of 50, most of them by an escape.
DOCSTRING = re.compile(
    r'(?:\A(?:[ \t]*(?:#[^\n]*)?\n)*|:[ \t]*(?:#[^\n]*)?\n\s*)[rRuU]?("""|\'\'\')(.+?)(?<!\\)\1', re.DOTALL
)


@cache
def docstring_corpus() -> list[str]:
    """Deduplicated docstrings of SHORTEST characters or more, in the order of their files.

    Searched for once (some seconds), then read from a file in Hugging Face's cache folder; where that cannot be
    written, once a process.
    """
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    name = f"docstrings-2-{python}-{torch.__version__}-{transformers.__version__}.json"
    path = Path(os.environ.get("HF_HOME") or HF_HOME) / "nanochat_hf" / name
    with contextlib.suppress(OSError, ValueError):  # not there, not readable, or cut short
        return json.loads(path.read_text(encoding="utf-8"))
    texts = list(dict.fromkeys(text for file in installed_files() for text in docstrings(file)))
    _keep(path, json.dumps(texts))
    return texts


def installed_files() -> list[Path]:
    """The Python files of the standard library, torch and transformers, in a stable order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(library.rglob("*.py")) if "site-packages" not in file.parts]
    for package in (torch, transformers):
        files += sorted(file for folder in package.__path__ for file in Path(folder).rglob("*.py"))
    return files


def docstrings(path: Path, shortest: int = SHORTEST) -> list[str]:
    """The docstrings of a Python file, without their indentation; none where it is no text in UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    found = (inspect.cleandoc(body) for _, body in DOCSTRING.findall(text) if len(body) >= shortest)
    return [body for body in found if len(body) >= shortest]


def _keep(path, text):
    # of use to later processes alone, so a full disk or a folder of somebody else's is no error
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()


@cache
def words(split: str) -> list[str]:
    """Lower-case words of 3 to 12 letters that occur twice or more in the corpus, as `share` splits them."""
    counts = Counter(w for text in docstring_corpus() for w in re.findall(r"(?<![\w])[a-z]{3,12}(?![\w])", text))
    return share(split, (w for w, n in counts.items() if n >= 2))


def share(split: str, found: Iterable[str]) -> list[str]:
    """The words of a split, shuffled stably: a tenth of any list is "test", the rest "train".

    Each word decides for itself, whatever other words there are.
    """
    return [
        w
        for w in sorted(found, key=lambda w: zlib.crc32(w.encode()))
        if (zlib.crc32(w[::-1].encode()) % 10 == 0) == (split == "test")
    ]


@cache
def listed_words(path: str, split: str) -> list[str]:
    """The words of `split` in a text file (.txt or .txt.gz) with one word a line; ValueError where it holds none.

    nanochat takes 370,000 English words from words_alpha.txt of https://github.com/dwyl/english-words.
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
