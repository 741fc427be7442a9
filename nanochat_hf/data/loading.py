"""Stop 1: a source → its rows, as one sequence (load_source) or as the shards of a stream (load_shards).

For every source the files are found first, then the split, then the rows. So a slice means the same for a file, a
folder, a saved data set and a Hub name, planned or streamed. Data that cannot be read is a ValueError that names the
file.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat_hf.files.data_file import DataFile
from nanochat_hf.files.listing import Listing, download, is_local, list_hub, list_local
from nanochat_hf.files.rows import ListRows, Rows, TableRows, joined, load_files
from nanochat_hf.files.shards import Shard, part_of, shards_of
from nanochat_hf.files.splits import SplitPart, parse_split, within
from nanochat_hf.tasks import get_task

from .sources import SourceConfig

DOWNLOADS = 8  # files of the Hub that are fetched at a time
EVERYTHING = "all"  # the split that means all splits


def load_source(source: SourceConfig) -> Rows:
    """The rows that `source` means. ValueError where they cannot be read or there are none."""
    return _chosen(source, *_whole(source))


def load_shards(source: SourceConfig) -> list[Shard]:
    """The shards that a stream of `source` hands out, one for each file that holds some of the rows.

    Rows are counted only as far as a bound needs it: a share in percent reads text files once, `start: 10` ten rows.
    ValueError for every fault that shows without reading all of the data; other faults show when their rows are read.
    """
    try:
        splits = chosen_files(source, saved_files(source) or listed(source).splits)
        shards: list[Shard] = []
        for name, part in _parts(source, splits):
            files = [file for file in splits[name] if file.is_remote or file.count(1)]
            count = sum(file.count() for file in files) if part.counted else None
            shards += shards_of(files, [part.range(count)])
        if source.start or source.rows is not None:
            shards = part_of(shards, source.start, source.rows)
        first = next((True for shard in shards for _ in shard.rows()), None)
    except ValueError as error:
        raise _named(source, error) from error
    except Exception as error:  # as in _chosen
        raise unreadable(source, error) from error
    if first is None:
        told = f"from {source.start} on " if source.start else ""
        raise ValueError(f"{source.label}: no rows {told}in split {source.split!r}; give another split, start or file")
    return shards


def listed(source: SourceConfig) -> Listing:
    """The files of a path or Hub name by split, and those that cannot be read."""
    path = str(source.path)
    return list_local(path, source.name) if is_local(path) else _hub(path, source.name)


_hub = functools.lru_cache(maxsize=64)(list_hub)  # several functions here ask for the same listing


def chosen_files(source: SourceConfig, splits: dict[str, list[DataFile]]) -> dict[str, list[DataFile]]:
    """The files of each split that `source.files` chooses."""
    return {name: source.chosen_files(files) for name, files in splits.items()} if source.files else splits


def unread(source: SourceConfig) -> list[str]:
    """Names of files of the source whose ending we cannot read; [] for a task and a saved data set."""
    return [] if source.task or source.path is None or _saved(source) else listed(source).unread


def is_remote(source: SourceConfig) -> bool:
    """Whether the path is a Hub name; org/name is one unless such a file or folder exists here."""
    return source.task is None and source.path is not None and not is_local(source.path)


def count_rows(source: SourceConfig, most: int) -> int:
    """The number of rows, or `most` where there are more; no more than `most` rows are read."""
    counted = 0
    for shard in load_shards(source):
        counted += shard.count(most - counted)
        if counted >= most:
            break
    return counted


def unreadable(source: SourceConfig, error: BaseException) -> ValueError:
    """The ValueError that says in one line why a source cannot be read."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return ValueError(f"{source.label}: cannot be loaded ({reason}); check the name and the files")


def _whole(source: SourceConfig) -> tuple[dict[str, Callable[[], Rows]], bool]:
    """({split: a function that loads its rows}, whether the splits were taken from `source.split`).

    A task cannot list its splits, and neither can a Hub that does not answer; then `source.split` names them.
    """
    if source.task:
        return {part.name: functools.partial(_task_rows, source, part) for part in parse_split(source.split)}, True
    saved = _saved(source)
    if saved is not None:
        if source.files is not None:
            raise ValueError(f"{source.label}: files={source.files!r} needs data files, not a saved data set; use rows")
        return {name: functools.partial(TableRows, dataset, source.label) for name, dataset in saved.items()}, False
    try:
        splits = chosen_files(source, listed(source).splits)
    except ValueError as error:
        raise _named(source, error) from error
    except Exception as error:  # the Hub does not answer; datasets may still have the data from an earlier run
        return {
            part.name: functools.partial(_from_hub, source, part.name, error) for part in parse_split(source.split)
        }, True
    return {name: functools.partial(_from_files, source, name, files) for name, files in splits.items()}, False


def _chosen(source: SourceConfig, splits: dict[str, Callable[[], Rows]], any_name: bool) -> Rows:
    """The rows of the splits that `source.split` names, cut by its bounds and by `start` and `rows`."""
    try:
        parts = parse_split(source.split) if any_name else [p for _, p in _parts(source, splits)]
        loaded = []
        for part in parts:
            rows = splits[part.name]()
            kept = within(
                [part.range(len(rows))],
                source.start if len(parts) == 1 else 0,
                source.rows if len(parts) == 1 else None,
            )
            loaded.append((rows, kept))
        chosen = joined([rows.select(kept) for rows, kept in loaded], source.label)
        if len(parts) > 1 and (source.start or source.rows is not None):
            chosen = chosen.select(within([(0, len(chosen))], source.start, source.rows))
    except ValueError as error:
        raise _named(source, error) from error
    except Exception as error:  # datasets and the Hub raise many kinds; the user needs the reason in one line
        raise unreadable(source, error) from error
    if not len(chosen):
        there = sum(len(rows) for rows, _ in loaded)
        raise ValueError(
            f"{source.label}: no rows from {source.start} on in split {source.split!r}, which has {there}; check "
            "start and rows"
        )
    return chosen


def _named(source: SourceConfig, error: ValueError) -> ValueError:
    """The error with the source's name before it, unless its text has the path or the task already."""
    text = " ".join(str(error).split())
    return ValueError(text) if str(source.path or source.task) in text else unreadable(source, ValueError(text))


def _parts(source: SourceConfig, splits: dict[str, Any]) -> list[tuple[str, SplitPart]]:
    """[(split, part)] for each part of `source.split`; the ValueError for an unknown split lists the known ones."""
    found = []
    for part in parse_split(source.split):
        if part.name == EVERYTHING and part.name not in splits:
            if part.first or part.stop:
                raise ValueError(f"{source.label}: split {source.split!r} cuts all splits at once; cut each, with +")
            found += [(name, SplitPart(name)) for name in splits]
        elif part.name in splits:
            found.append((part.name, part))
        else:
            raise ValueError(f"{source.label}: no split {part.name!r}, it has {', '.join(splits)}; give one of them")
    return found


def _from_files(source: SourceConfig, split: str, files: list[DataFile]) -> Rows:
    if not any(file.is_remote for file in files):
        return load_files(files, source.label)
    if len({file.kind for file in files}) == 1 and files[0].is_table and source.files is None:
        return _from_hub(source, split)  # datasets keeps it under this name, so later runs need no connection
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(DOWNLOADS) as pool:
        return load_files(list(pool.map(download, files)), source.label)


def _from_hub(source: SourceConfig, split: str, error: Exception | None = None) -> Rows:
    from datasets import load_dataset

    try:
        return TableRows(load_dataset(str(source.path), source.name, split=split), source.label)
    except Exception:
        if error is not None:
            raise error from None
        raise


def _saved(source: SourceConfig) -> dict[str, Any] | None:
    """{split: datasets.Dataset} of a folder that save_to_disk wrote; None for any other."""
    from datasets import Dataset, load_from_disk

    folder = Path(str(source.path))
    if source.task or not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return None
    try:
        saved = load_from_disk(str(folder))
    except Exception as error:  # as in _chosen
        raise unreadable(source, error) from error
    return {"train": saved} if isinstance(saved, Dataset) else {str(name): saved[name] for name in saved}


def saved_files(source: SourceConfig) -> dict[str, list[DataFile]] | None:
    """{split: Arrow files in order} of a folder that save_to_disk wrote; None for any other."""
    folder = Path(str(source.path))
    if (folder / "dataset_dict.json").is_file():
        names = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        return {name: _arrow_files(folder / name) for name in names}
    return {"train": _arrow_files(folder)} if (folder / "state.json").is_file() else None


def _arrow_files(folder: Path) -> list[DataFile]:
    state = json.loads((folder / "state.json").read_text())
    return [DataFile(str(folder / entry["filename"]), "arrow") for entry in state["_data_files"]]


def _task_rows(source: SourceConfig, part: SplitPart) -> Rows:
    """A task's rows of one split; where only `start` and `rows` bound it, no more rows are made than they need."""
    whole = part.first is part.stop is None and parse_split(source.split) == [part]
    limit = source.start + source.rows if whole and source.rows is not None else None
    rows = get_task(str(source.task)).load(part.name, path=source.path, limit=limit)
    if isinstance(rows, Rows):
        return rows
    return ListRows(rows, source.label) if isinstance(rows, list) else TableRows(rows, source.label)
