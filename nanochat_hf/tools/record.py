"""A record: what was measured, by which command, on what. Scripts that measure write one, `scripts.records` reads it.

A record is a folder `docs/records/DATE-name/`; docs/records/README.md describes its files. This module knows the three
that a program can write: `command`, `env.json` and `table.json` (or `metrics.jsonl`). The words in README.md and
record.yaml are written by a person.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DATED = re.compile(r"\d{4}-\d{2}-\d{2}-.+")
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "triton",
    "torch_xla",
    "nvidia-cudnn-frontend",
)
VARIABLES = (
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "WORLD_SIZE",
    "PJRT_DEVICE",
    "ACCELERATE_MIXED_PRECISION",
    "TRITON_INTERPRET",
)

Value = str | int | float | bool | None  # one figure of a table; None where nothing was measured


@dataclass(frozen=True)
class Table:
    """Rows with named columns.

    `columns` maps each name to its unit, or to None where there is none, in the order of the values of a row.

    >>> steps = Table("Whole training steps", {"depth": "layers", "speed": "tokens/s"}, [[12, 638000], [20, 187700]])
    >>> steps.dicts()[1]
    {'depth': 20, 'speed': 187700}
    """

    about: str
    columns: dict[str, str | None]
    rows: list[list[Value]]

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {number} of table {self.about!r} has {len(row)} values for {len(self.columns)} columns; "
                    "give one value a column, null where nothing was measured"
                )

    def dicts(self) -> list[dict[str, Value]]:
        """The rows, each as {column: value}."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def numbers(self, column: str) -> list[float]:
        """The values of a column of numbers. ValueError where one is no number."""
        values = [row[list(self.columns).index(column)] for row in self.rows]
        numbers = [value for value in values if isinstance(value, int | float)]
        if len(numbers) < len(values):
            raise ValueError(f"column {column} of table {self.about!r} holds values that are no numbers; use dicts()")
        return numbers


def table_of(about: str, rows: Sequence[Mapping[str, Value]], units: Mapping[str, str] | None = None) -> Table:
    """A table from rows that are mappings; a column that a row lacks is None there.

    >>> table_of("Parts", [{"op": "rope", "time": 0.17}], units={"time": "ms"}).columns
    {'op': None, 'time': 'ms'}
    """
    units = units or {}
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table(about, {name: units.get(name) for name in names}, [[row.get(name) for name in names] for row in rows])


@dataclass(frozen=True)
class Environment:
    """On what and with what figures were measured; None where it is not known."""

    date: str  # ISO 8601 with a time zone: of two records with the same claim the later one counts
    commit: str | None
    uncommitted_changes: bool | None
    cpu: str | None
    cpu_cores: int | None
    accelerator: str | None  # the device's own name, such as "NVIDIA H100 80GB HBM3"; None: none was used
    num_accelerators: int | None
    software: dict[str, str | None] = field(default_factory=dict)  # package → version
    variables: dict[str, str] = field(default_factory=dict)  # environment variables that change what runs
    note: str = ""

    def hardware(self) -> str:
        """In words: `2 × NVIDIA H200`, `CPU, 2 cores`, `not recorded`."""
        if self.accelerator:
            return f"{self.num_accelerators or 1} × {self.accelerator}"
        if self.cpu or self.cpu_cores:
            cores = (
                f"{self.cpu_cores} core{'s' if self.cpu_cores != 1 else ''}" if self.cpu_cores else "cores not counted"
            )
            return f"{self.cpu or 'CPU'}, {cores}"
        return "not recorded"


def environment(note: str = "") -> Environment:
    """This process's environment, with the commit of the working directory's repository."""
    name, count = _accelerator()
    status = _git("status", "--porcelain", "--untracked-files=no")
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_git("rev-parse", "HEAD"),
        uncommitted_changes=None if status is None else bool(status),
        cpu=_cpu(),
        cpu_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        accelerator=name,
        num_accelerators=count,
        software={"python": platform.python_version()} | {package: _version(package) for package in PACKAGES} | _cuda(),
        variables={key: os.environ[key] for key in VARIABLES if key in os.environ},
        note=note,
    )


def write_record(
    folder: str | Path,
    tables: Mapping[str, Table] | None = None,
    *,
    metrics: str | Path | None = None,
    command: str | None = None,
    note: str = "",
) -> Path:
    """Write what a program knows of a record, and return its folder.

    folder: such as `docs/records/steps`, which becomes `docs/records/2026-12-01-steps`, by today's date in UTC.
    tables: {name: Table} for table.json. metrics: a run's metrics.jsonl, which is copied. One of both at least.
    command: as it was run; left out, this process's own command line.
    ValueError where there are no figures, or where the folder is a record already: records are never written over.
    """
    if not tables and metrics is None:
        raise ValueError(f"{folder}: a record without figures says nothing; give tables or metrics")
    measured = environment(note)
    folder = Path(folder)
    if not DATED.fullmatch(folder.name):
        folder = folder.with_name(f"{measured.date[:10]}-{folder.name}")
    if (folder / "env.json").exists():
        raise ValueError(f"{folder} is a record already, and records are not written over; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "command").write_text((command or command_line()) + "\n")
    if tables:
        (folder / "table.json").write_text(dump_tables(tables))
    if metrics is not None:
        shutil.copyfile(metrics, folder / "metrics.jsonl")
    (folder / "env.json").write_text(json.dumps(asdict(measured), indent=1, ensure_ascii=False) + "\n")
    return folder


def command_line() -> str:
    """How this process was started, for a shell; the interpreter's folder is left out, as private."""
    first, *others = sys.orig_argv
    return shlex.join([Path(first).name, *others])


def dump_tables(tables: Mapping[str, Table]) -> str:
    """table.json's text: one row a line, so that a change of a figure is a change of its line.

    >>> print(dump_tables({"parts": Table("Parts", {"op": None, "time": "ms"}, [["rope", 0.17]])}), end="")
    {
     "parts": {
      "about": "Parts",
      "columns": {"op": null, "time": "ms"},
      "rows": [
       ["rope", 0.17]
      ]
     }
    }
    """
    parts = []
    for name, table in tables.items():
        rows = ",\n".join(f"   {_json(row)}" for row in table.rows)
        head = f'  "about": {_json(table.about)},\n  "columns": {_json(table.columns)},\n'
        parts.append(f' {_json(name)}: {{\n{head}  "rows": [\n{rows}\n  ]\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def load_tables(text: str) -> dict[str, Table]:
    """The tables in table.json's text. ValueError or TypeError where it is not what `dump_tables` writes."""
    return {name: Table(**content) for name, content in json.loads(text).items()}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str | None:
    """The processor's name as Linux tells it, elsewhere what Python knows."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine() or None


def _accelerator() -> tuple[str | None, int | None]:
    """Name and number of the GPUs that this process sees; (None, None) without one."""
    import torch  # here, since most of this module's readers do without

    if not torch.cuda.is_available():
        return None, None
    return torch.cuda.get_device_name(), torch.cuda.device_count()


def _cuda() -> dict[str, str | None]:
    """Versions of CUDA and cuDNN, where torch was built with them."""
    import torch

    if torch.version.cuda is None:
        return {}
    return {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
