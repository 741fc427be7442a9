"""The embedded text: which strings of a Python file are docstrings, where the corpus is kept, and its words."""

import ast
import sysconfig
import warnings
from pathlib import Path

import pytest

from nanochat_hf.tasks import embedded

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
SOURCE = '''#!/usr/bin/env python
# a comment

"""Of the module."""

import os

NAME = """assigned, not a docstring"""


class Thing(  # a comment with a colon: here
    object,
):
    r\'\'\'Of the class, with a \\d.\'\'\'

    async def of(self, a: int = 1,
                 b: str = ":") -> str:  # why

        """Of the method,

            indented further,
        and not.
        """
        return f("""an argument""")

    def bare(self): return 1
'''


def by_syntax(path, shortest):
    """The docstrings of a file, from its syntax tree."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(path.read_text(encoding="utf-8"))
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return {text for text in found if text and len(text) >= shortest}


def test_docstrings_are_found_without_their_indentation(tmp_path):
    path = tmp_path / "source.py"
    path.write_text(SOURCE)
    assert embedded.docstrings(path, 1) == [
        "Of the module.",
        "Of the class, with a \\d.",
        "Of the method,\n\n    indented further,\nand not.",
    ]
    assert embedded.docstrings(path, 30) == ["Of the method,\n\n    indented further,\nand not."]
    path.write_bytes('"""Ünreadable."""'.encode("latin-1"))
    assert embedded.docstrings(path, 1) == [] == embedded.docstrings(tmp_path / "none.py", 1)


def test_they_are_those_of_the_syntax_tree():
    """In all files of some packages, but for a few with escapes, which stay as they are written."""
    files = [file for name in ("asyncio", "json", "logging", "unittest") for file in (LIBRARY / name).glob("*.py")]
    files += [LIBRARY / f"{name}.py" for name in ("argparse", "difflib", "functools", "inspect", "tarfile", "typing")]
    ours = {text.strip() for file in files for text in embedded.docstrings(file)}
    expected = {text.strip() for file in files for text in by_syntax(file, embedded.SHORTEST)}
    assert len(expected) > 100 and len(ours ^ expected) <= 0.05 * len(expected), sorted(ours ^ expected)


@pytest.fixture
def one_file(monkeypatch, tmp_path):
    """An installation of one file with one docstring, and nothing remembered of another."""
    path = tmp_path / "source.py"
    path.write_text('"""' + "A long docstring. " * 20 + '"""\n')
    monkeypatch.setattr(embedded, "installed_files", lambda: [path, path])
    embedded.docstring_corpus.cache_clear()
    yield path
    embedded.docstring_corpus.cache_clear()


def test_the_corpus_is_kept_where_it_can_be(one_file, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    found = embedded.docstring_corpus()
    assert len(found) == 1 and found[0].startswith("A long docstring.")
    one_file.unlink()  # from now on it can only come from the cache
    embedded.docstring_corpus.cache_clear()
    assert embedded.docstring_corpus() == found
    (kept,) = (tmp_path / "home" / "nanochat_hf").iterdir()
    kept.write_text('["cut sho')
    embedded.docstring_corpus.cache_clear()
    assert embedded.docstring_corpus() == []  # searched again, in a file that is gone


def test_a_cache_that_cannot_be_written_is_no_error(one_file, monkeypatch, tmp_path):
    (tmp_path / "home").write_text("a file in the folder's place")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert len(embedded.docstring_corpus()) == 1
    assert (tmp_path / "home").read_text() == "a file in the folder's place"


def test_a_word_is_in_one_split_whatever_other_words_there_are():
    some = [f"{a}{b}{c}" for a in "abcdefgh" for b in "aeiou" for c in "klmnprst"]
    train, test = (embedded.share(split, some) for split in ("train", "test"))
    assert set(train) | set(test) == set(some) and not set(train) & set(test)
    assert 0.05 < len(test) / len(some) < 0.15
    assert embedded.share("test", some[::2]) == [word for word in test if word in some[::2]]
