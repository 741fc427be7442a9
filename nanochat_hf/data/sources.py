"""An entry of a recipe: which rows of which data set, how often, and the names of its columns."""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat_hf.config import guessed
from nanochat_hf.files.splits import parse_split

from .formats import FORMATS

SLICE = re.compile(r"-?\d*:-?\d*")


@dataclass(frozen=True)
class SourceConfig:
    """One data set of a mixture: a Hub name, local file(s) or a folder in `path`, or a `task`.

    `split` is written as in datasets ("train[:90%]"); `start` and `rows` choose rows `start` to `start + rows` of it.
    They are taken `repeat` times, or `weight` times: 0.5 takes a seeded half, 1.5 takes all and a half once more.
    `name` is the configuration of a Hub data set or a folder. `files` chooses among the files of a split, in order, as
    a slice: ":-1" all but the last, "-1:" the last. `columns` renames columns: {prompt: question, completion:
    answer}. `converter` sets the form of the rows, one of formats.FORMATS. Numbers may be text, because YAML reads 1e3
    as text. ValueError says which key is wrong and what it may be.
    """

    path: str | None = None
    name: str | None = None
    split: str = "train"
    task: str | None = None
    repeat: int = 1
    rows: int | None = None
    start: int = 0
    weight: float | None = None
    columns: dict[str, str] | None = None
    converter: str | None = None
    files: str | None = None

    def __post_init__(self) -> None:
        for key in ("path", "name", "split", "task", "converter", "files"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise ValueError(f"data source: {key}={value!r} must be text; quote it, or leave the key out")
        if self.path is None and self.task is None:
            raise ValueError("a data source needs path or task; give one of them")
        if self.path is not None:
            object.__setattr__(self, "path", os.path.expanduser(self.path))
        for key, least in (("repeat", 1), ("rows", 1), ("start", 0)):
            if getattr(self, key) is not None:
                object.__setattr__(self, key, self._whole(key, least))
        if self.weight is not None:
            object.__setattr__(self, "weight", self._factor())
        if self.weight is not None and self.repeat != 1:
            raise ValueError(
                f"{self.label}: repeat={self.repeat} and weight={self.weight} say the same thing twice; give one"
            )
        if self.converter is not None and self.converter not in FORMATS:
            raise ValueError(f"{self.label}: converter={self.converter!r} is unknown; choose from {', '.join(FORMATS)}")
        names = self.columns or {}
        if not isinstance(names, dict) or not all(isinstance(n, str) for pair in names.items() for n in pair):
            raise ValueError(f"{self.label}: columns={self.columns!r} must map new names to those of the data")
        if self.files is not None and (self.path is None or not SLICE.fullmatch(self.files)):
            raise ValueError(
                f"{self.label}: files={self.files!r} must be a slice of the files of a path, as ':-1' or '-1:'"
            )
        try:
            parse_split(self.split)
        except ValueError as error:
            raise ValueError(f"{self.label}: {error}") from None

    def _whole(self, key: str, least: int) -> int:
        """The value of `key` as a whole number, `least` or more; 10, "10", 1e3 and "1e3" all count as one."""
        value = _number(getattr(self, key))
        if value is None or not math.isfinite(value) or value != int(value) or value < least:
            remedy = "leave the source out instead" if key == "repeat" else f"give {key} from {least} on"
            raise ValueError(
                f"{self.label}: {key}={getattr(self, key)!r} must be a whole number from {least}; {remedy}"
            )
        return int(value)

    def _factor(self) -> float:
        value = _number(self.weight)
        if value is None or not 0 < value < math.inf:
            raise ValueError(f"{self.label}: weight={self.weight!r} must be above 0; leave the source out instead")
        return float(value)

    def chosen_files(self, files: Sequence[Any]) -> list[Any]:
        """Those of a split's files that `files` chooses; ValueError where none is left."""
        if self.files is None:
            return list(files)
        start, _, stop = self.files.partition(":")
        chosen = list(files)[slice(*(int(end) if end else None for end in (start, stop)))]
        if not chosen:
            raise ValueError(f"{self.label}: files={self.files!r} leaves none of {len(files)} files; give more files")
        return chosen

    @property
    def label(self) -> str:
        """What messages call this source."""
        return ":".join(filter(None, (self.task, self.path, self.name)))

    @property
    def copies(self) -> float:
        """How often a row is taken, on average."""
        return self.weight if self.weight is not None else self.repeat

    @classmethod
    def from_recipe(cls, entry: Any) -> "SourceConfig":
        """A mapping of a recipe → SourceConfig; ValueError names an unknown key."""
        if not isinstance(entry, dict):
            raise ValueError(f"data source: {entry!r} must be a mapping such as {{path: chats.jsonl, repeat: 2}}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(str(key) for key in entry if key not in known)
        if unknown:
            raise ValueError(f"data source: unknown keys {guessed(unknown, known)}; known are {', '.join(known)}")
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        given: dict[str, Any] = {key: defaults[key] if value is None else value for key, value in entry.items()}
        return cls(**given)

    @classmethod
    def from_recipe_list(cls, entries: Any, key: str = "train_data") -> list["SourceConfig"]:
        """A recipe's list of sources, [] where it is empty; ValueError where it is no list."""
        if entries is None:
            return []
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            raise ValueError(f"{key}: {entries!r} must be a list of data sources; begin each with a dash")
        return [cls.from_recipe(entry) for entry in entries]


def _number(value: Any) -> float | None:
    """A number, also from text; None for anything else.

    A boolean is no number here, since YAML reads yes and on as booleans.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return int(value) if isinstance(value, int) else float(value)
    except ValueError:
        return None
