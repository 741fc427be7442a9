"""A path, a pattern, a folder or a Hub name → the data files of each split, and the files that cannot be read."""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .data_file import HUB, DataFile
from .endings import READABLE, kind_of

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
NUMBERED = re.compile(r"(?P<split>\w+(?:[.-]\w+)*)-\d{5}-of-\d{5}")  # how the Hub's own tools name their files
WORD = re.compile(rf"(?:^|[-._ 0-9])({'|'.join(SPLIT_WORDS)})(?=[-._ 0-9]|$)")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
ABOUT = {
    "dataset_infos.json",
    "dataset_info.json",
    "state.json",
    "dataset_dict.json",
    "readme.md",
    "license",
    "license.txt",
}
WILD = "*?["


@dataclass(frozen=True)
class Listing:
    """The data files of a path or Hub name by split, and the names of the other files, whose ending we cannot read."""

    splits: dict[str, list[DataFile]]
    unread: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[DataFile]:
        """The files of all splits."""
        return [file for files in self.splits.values() for file in files]


def is_local(path: str) -> bool:
    """Whether a path means files on this machine.

    It does where it exists, is a pattern, has the ending of a data file, or could be no Hub name.

    >>> is_local("karpathy/fineweb-edu-100b-shuffle"), is_local("text/*.parquet"), is_local("chats.jsonl")
    (False, True, True)
    """
    if os.path.lexists(path) or any(c in path for c in WILD) or kind_of(path) is not None:
        return True
    return HUB_NAME.fullmatch(path) is None or path in (".", "..") or path.startswith(("./", "../"))


def list_local(path: str, name: str | None = None) -> Listing:
    """The files that a local path, pattern or folder holds; ValueError where it holds none.

    `name` picks a configuration of a folder.
    """
    if os.path.isdir(path):
        return _folder(path, name)
    found = [path]  # a file that exists is no pattern, even with brackets in its name
    if not os.path.lexists(path):
        found = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
    if not found:
        raise ValueError(f"{path}: no such file; give an existing data file")
    files, unread = _readable(found)
    if not files:
        raise ValueError(f"{found[0]}: its ending cannot be read; give a file that ends in {READABLE}")
    named = {_split_of(file.basename) for file in files}
    splits = {"train": files}
    if len(named) == 1 and (own := named.pop()):
        splits[own] = files  # so that {path: test.jsonl, split: test} finds the file
    return Listing(splits, unread)


def list_hub(path: str, name: str | None = None) -> Listing:
    """The files of a data set on the Hub by split; errors of the Hub are raised as they are."""
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().dataset_info(path)
    names = HfApi().list_repo_files(path, repo_type="dataset", revision=info.sha)
    card = ""
    if "README.md" in names:
        card = Path(hf_hub_download(path, "README.md", repo_type="dataset", revision=info.sha)).read_text("utf-8")
    return _tree(names, f"{HUB}datasets/{path}@{info.sha}", card, name, path)


def download(file: DataFile) -> DataFile:
    """A local copy of a file on the Hub, downloaded unless the cache has it; a local file as it is."""
    if not file.is_remote:
        return file
    from huggingface_hub import hf_hub_download

    repo, _, rest = file.name.partition("@")
    revision, _, inner = rest.partition("/")
    local = hf_hub_download(repo, inner, repo_type="dataset", revision=revision)
    return DataFile(local, file.kind, file.packing)


def _folder(path: str, name: str | None) -> Listing:
    names = sorted(
        str(p.relative_to(path)) for p in Path(path).rglob("*") if p.is_file() and not _hidden(p.relative_to(path))
    )
    card = Path(path, "README.md")
    return _tree(names, path.rstrip("/"), card.read_text("utf-8") if card.is_file() else "", name, path)


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _tree(names: Sequence[str], root: str, card: str, name: str | None, label: str) -> Listing:
    """The files `names` below `root` by split: as the card's configuration says, else by their names."""
    patterns = _configured(card, name, label)
    splits: dict[str, list[DataFile]] = {}
    unread: list[str] = []
    if patterns is None:
        for each in sorted(names):
            if each.lower().rpartition("/")[2] in ABOUT or _hidden(Path(each)):
                continue
            kind = kind_of(each)
            if kind is None:
                unread.append(each)
            else:
                splits.setdefault(_split_of(each) or "train", []).append(DataFile(f"{root}/{each}", *kind))
    else:
        for split, globs in patterns:
            found = [each for pattern in globs for each in sorted(names) if _matches(each, pattern)]
            files, others = _readable(found, root)
            splits.setdefault(split, []).extend(files)
            unread += others
    splits = {split: files for split, files in splits.items() if files}
    if not splits:
        raise ValueError(f"{label}: no file there can be read; give files that end in {READABLE}")
    return Listing(splits, unread)


def _readable(names: Sequence[str], root: str = "") -> tuple[list[DataFile], list[str]]:
    files, unread = [], []
    for each in names:
        kind = kind_of(each)
        if kind is None:
            unread.append(each)
        else:
            files.append(DataFile(f"{root}/{each}" if root else each, *kind))
    return files, unread


def _split_of(name: str) -> str | None:
    """The split that is in the name of the file, or else of a folder above it; None where there is none.

    >>> _split_of("data/test-00000-of-00001.parquet"), _split_of("validation/a.jsonl"), _split_of("chats.jsonl")
    ('test', 'validation', None)
    """
    for part in reversed(name.split("/")):
        if numbered := NUMBERED.match(part):
            return numbered["split"]
        if word := WORD.search(part.lower()):
            return SPLIT_WORDS[word[1]]
    return None


def _matches(name: str, pattern: str) -> bool:
    from fsspec.utils import glob_translate

    return re.match(glob_translate(pattern.removeprefix("./")), name) is not None


def _configured(card: str, name: str | None, label: str) -> list[tuple[str, list[str]]] | None:
    """[(split, patterns)] of the configuration `name` in a card's head; None where the card says nothing of files."""
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, re.S)
    try:
        about = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError:
        about = {}
    configs = [c for c in (about or {}).get("configs") or [] if isinstance(c, dict)]
    if not configs:
        if name is not None:
            raise ValueError(f"{label}: no configuration {name!r}, its card names none; leave name out")
        return None
    known = [str(c.get("config_name", "default")) for c in configs]
    if name is None:
        name = next((str(c.get("config_name")) for c in configs if c.get("default")), None)
        name = name or ("default" if "default" in known else known[0] if len(known) == 1 else None)
        if name is None:
            raise ValueError(f"{label}: it has several configurations; give name: one of {', '.join(known)}")
    if name not in known:
        raise ValueError(f"{label}: no configuration {name!r}; give name: one of {', '.join(known)}")
    config = configs[known.index(name)]
    return _patterns(config.get("data_files"), str(config.get("data_dir") or "").strip("/"))


def _patterns(files: Any, folder: str) -> list[tuple[str, list[str]]] | None:
    if files is None:
        return [("train", [f"{folder}/**"])] if folder else None
    listed = files if isinstance(files, list) else [files]
    found = []
    for entry in listed:
        split, path = (entry.get("split", "train"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        paths = path if isinstance(path, list) else [path]
        found.append((str(split), [f"{folder}/{p}" if folder else str(p) for p in paths]))
    return found
