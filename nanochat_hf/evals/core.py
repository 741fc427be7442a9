"""CORE (DCLM, arXiv:2406.11794): in-context tasks of three kinds, their data, their prompts and the score.

A prompt is the few-shot examples, each followed by a blank line, then the item. core_scoring.py scores in batches.
"""

import csv
import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

KINDS = ("multiple_choice", "schema", "language_modeling")
BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
BUNDLE_HELP = (
    "the evaluation bundle (core.yaml, eval_meta_data.csv, eval_data/), zipped or unpacked; "
    f"nanochat's is at {BUNDLE_URL}"
)
Item = dict[str, Any]
Reader = Callable[[str], bytes | None]


@dataclass(frozen=True)
class CoreTask:
    """One task: its items, the number of solved examples before each, and the text between question and answer.

    By `kind`, an item holds: multiple_choice query, choices, gold; schema context_options, continuation, gold;
    language_modeling context, continuation. `baseline` is the accuracy of guessing, from 0 to 1.
    """

    label: str
    kind: str
    items: list[Item]
    num_fewshot: int = 0
    delimiter: str = " "
    baseline: float = 0.0

    def chosen(self, limit: int | None = None) -> list[Item]:
        """The items in the order that every evaluation uses, at most `limit` of them."""
        items = list(self.items)
        random.Random(1337).shuffle(items)
        return items[:limit]


def load_bundle(path: str | Path, limit: int | None = None) -> tuple[list[CoreTask], list[str]]:
    """Read a bundle, a zip file or a folder: the tasks in core.yaml's order, and the labels of tasks without data.

    Raises ValueError, naming the file and the fault, if it is no bundle, and if `limit` items of a task are too few for
    its solved examples.
    """
    read = _reader(Path(path))
    listing = read("core.yaml")
    if listing is None:
        raise ValueError(f"--core-data {path}: holds no core.yaml; give {BUNDLE_HELP}")
    try:
        entries = yaml.safe_load(listing)["icl_tasks"]
        table = csv.DictReader(io.StringIO((read("eval_meta_data.csv") or b"").decode()))
        baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in table}
        tasks = [(_task(entry, baselines), read(f"eval_data/{entry['dataset_uri']}")) for entry in entries]
    except (yaml.YAMLError, KeyError, TypeError, IndexError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--core-data {path}: core.yaml or eval_meta_data.csv is not as expected ({error!r}); give {BUNDLE_HELP}"
        ) from None
    for task, lines in tasks:
        task.items.extend(_items(task, lines, path) if lines is not None else ())
        if lines is not None:
            enough(task, len(task.items[:limit]))
    return [task for task, lines in tasks if lines is not None], [task.label for task, lines in tasks if lines is None]


def _reader(path: Path) -> Reader:
    # a function from a name below the bundle's top folder to the file's bytes, or None if there is no such file
    if not path.exists():
        raise ValueError(f"--core-data {path}: no such file or folder; give {BUNDLE_HELP}")
    if path.is_dir():
        folder = path if (path / "core.yaml").is_file() else path / "eval_bundle"
        return lambda name: (folder / name).read_bytes() if (folder / name).is_file() else None
    try:
        bundle = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"--core-data {path}: cannot be read ({error}); give {BUNDLE_HELP}") from None
    names = set(bundle.namelist())
    top = min((n.removesuffix("core.yaml") for n in names if n.split("/")[-1] == "core.yaml"), key=len, default="")
    return lambda name: bundle.read(top + name) if top + name in names else None


def _task(entry: Mapping[str, Any], baselines: Mapping[str, float]) -> CoreTask:
    label, kind = entry["label"], entry["icl_task_type"]
    if kind not in KINDS:
        raise ValueError(f"CORE task {label}: icl_task_type {kind!r} is unknown; known are {', '.join(KINDS)}")
    if label not in baselines:
        raise ValueError(f"CORE task {label}: eval_meta_data.csv has no random baseline for it; add its row")
    return CoreTask(
        label, kind, [], entry["num_fewshot"][0], entry.get("continuation_delimiter", " "), baselines[label]
    )


def _items(task: CoreTask, lines: bytes, path: str | Path) -> Iterator[Item]:
    for number, line in enumerate(lines.decode().split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"--core-data {path}: {task.label} line {number} is not JSON ({error.msg}); fetch the bundle again"
                ) from None


def enough(task: CoreTask, count: int) -> None:
    """Raise ValueError if `count` items are too few to take the solved examples of an item from the others."""
    if count <= task.num_fewshot:
        raise ValueError(
            f"CORE task {task.label}: {count} items are too few for num_fewshot={task.num_fewshot}; "
            f"allow at least {task.num_fewshot + 1} items a task"
        )


def prompts(task: CoreTask, items: Sequence[Item], index: int) -> list[str]:
    """The texts whose tokens decide item `index`: one per option; for language_modeling without and with continuation.

    >>> prompts(CoreTask("t", "multiple_choice", []), [{"query": "1+1=", "choices": ["2", "3"], "gold": 0}], 0)
    ['1+1= 2', '1+1= 3']
    """
    enough(task, len(items))
    others = [i for i in range(len(items)) if i != index]
    shots = random.Random(1234 + index).sample(others, task.num_fewshot)
    before = "".join(_solved(task, items[i]) + "\n\n" for i in shots)
    item, between = items[index], task.delimiter
    if task.kind == "multiple_choice":
        return [before + item["query"] + between + choice for choice in item["choices"]]
    if task.kind == "schema":
        return [before + context + between + item["continuation"] for context in item["context_options"]]
    question = before + item["context"].strip() + between
    # without the trailing space, which may belong to the first token of the continuation
    return [question.strip(), question + item["continuation"]]


def _solved(task: CoreTask, item: Item) -> str:
    if task.kind == "multiple_choice":
        return item["query"] + task.delimiter + item["choices"][item["gold"]]
    if task.kind == "schema":
        return item["context_options"][item["gold"]] + task.delimiter + item["continuation"]
    return item["context"].strip() + task.delimiter + item["continuation"]


def common_length(sequences: Sequence[Sequence[int]], end: bool = False) -> int:
    """How many tokens all sequences share at the beginning, or at the end.

    >>> common_length([[1, 2, 3], [1, 2, 4]])
    2
    """
    if end:
        sequences = [sequence[::-1] for sequence in sequences]
    shared = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return shared


def spans(task: CoreTask, texts: list[list[int]], positions: int | None = None) -> list[tuple[list[int], int]]:
    """What is scored of each prompt: (ids, start), where ids[start:] is scored.

    `texts` are the ids of each prompt. A prompt of more than `positions` tokens loses its beginning.
    """
    if task.kind == "schema":
        shared = common_length(texts, end=True)
        starts = [len(ids) - shared for ids in texts]
    else:
        starts = [common_length(texts)] * len(texts)
    if task.kind == "language_modeling":
        texts, starts = texts[1:], starts[1:]
    out = []
    for ids, start in zip(texts, starts, strict=True):
        cut = max(0, len(ids) - positions) if positions else 0
        # At least one token is scored, even if an option is the beginning of another. A first token cannot be scored.
        out.append((ids[cut:], max(1, min(start, len(ids) - 1) - cut)))
    return out


def centred(accuracy: float, baseline: float) -> float:
    """(accuracy − baseline) ÷ (1 − baseline): 0 for guessing, 1 for perfect."""
    return (accuracy - baseline) / (1 - baseline)


@dataclass(frozen=True)
class CoreResult:
    """The result of each task, and the labels of the tasks without data.

    A row holds task, kind, shots, items, accuracy, baseline and centred.
    """

    rows: list[dict[str, Any]]
    missing: list[str]

    @property
    def core(self) -> float:
        """The mean of the centred accuracies of the tasks that ran."""
        return sum(row["centred"] for row in self.rows) / len(self.rows)

    @property
    def name(self) -> str:
        """The score's name: CORE, or CORE (partial, 17 of 22) if data was missing."""
        total = len(self.rows) + len(self.missing)
        return f"CORE (partial, {len(self.rows)} of {total})" if self.missing else "CORE"
