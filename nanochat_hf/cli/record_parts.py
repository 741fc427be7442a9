"""Read a record and find what it lacks. What a record holds stands in docs/records/README.md.

A fault is one line: which record, what is wrong, what to do.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import yaml

from nanochat_hf.tools.record import Environment, Table, Value, load_tables

SENTENCES = ("Asked", "Found", "Follows")
Part = TypeVar("Part")
METRICS = "metrics"  # the name under which a claim takes figures from metrics.jsonl


@dataclass(frozen=True)
class Claim:
    """A line of docs/results.md: columns `show` of the rows of `table` that match `where`.

    A column that differs between the rows is shown as a range; `by` names a column whose values are kept apart.
    """

    claim: str
    topic: str
    table: str
    show: list[str]
    where: dict[str, Value] = field(default_factory=dict)
    by: str | None = None


@dataclass(frozen=True)
class Negative:
    """What was tried and did not help."""

    tried: str
    got: str


@dataclass(frozen=True)
class Record:
    """A record that was read whole and has all its parts."""

    folder: Path
    title: str
    environment: Environment
    tables: dict[str, Table]
    claims: list[Claim]
    negative: list[Negative]

    @property
    def date(self) -> datetime:
        """When it was measured."""
        return datetime.fromisoformat(self.environment.date)


class Fault(Exception):
    """What a record lacks, and what to do about it, in one line."""


def read_record(folder: Path) -> Record:
    """The record in `folder`. Raises an ExceptionGroup of every Fault in it."""
    faults: list[Exception] = []

    def part(read: Callable[[], Part]) -> Part | None:
        try:
            return read()
        except Fault as fault:
            faults.append(Fault(f"{folder.name}: {fault}"))
            return None

    title = part(lambda: read_title(folder))
    part(lambda: check_command(folder))
    environment = part(lambda: read_environment(folder))
    tables = part(lambda: read_tables(folder))
    words = part(lambda: read_words(folder))
    if words is not None and tables is not None:
        for claim in words[0]:
            part(partial(claim_text, claim, tables))
    if faults or title is None or environment is None or tables is None or words is None:
        raise ExceptionGroup(f"{folder.name} is not whole", faults)
    return Record(folder, title, environment, tables, *words)


def read_text(folder: Path, name: str, remedy: str) -> str:
    """A part's text. Fault where it is missing or empty."""
    path = folder / name
    if not path.is_file():
        raise Fault(f"{name} is missing; {remedy}")
    text = path.read_text()
    if not text.strip():
        raise Fault(f"{name} is empty; {remedy}")
    return text


def read_title(folder: Path) -> str:
    """README.md's title, once its three sentences are there."""
    text = read_text(folder, "README.md", "write a title and three sentences: **Asked.** **Found.** **Follows.**")
    title = re.match(r"# (.+)\n", text)
    if title is None:
        raise Fault("README.md does not begin with a title; write '# …' in its first line")
    for word in SENTENCES:
        if not re.search(rf"^\*\*{word}\.\*\* \S", text, re.MULTILINE):
            raise Fault(f"README.md has no line '**{word}.** …'; write that sentence")
    return title.group(1).strip()


def check_command(folder: Path) -> None:
    """Fault where nothing says how the figures were made."""
    read_text(folder, "command", "write the command as it was run, or a comment that says what is known of it")


def read_environment(folder: Path) -> Environment:
    """env.json. Fault where a field is missing, or where its day is not the folder's."""
    text = read_text(folder, "env.json", "nanochat_hf.tools.record.write_record writes it")
    try:
        content = json.loads(text)
        environment = Environment(**content)
        day = datetime.fromisoformat(environment.date)
    except (ValueError, TypeError, KeyError) as error:
        raise Fault(
            f"env.json cannot be read ({error}); give {', '.join(f.name for f in fields(Environment))}"
        ) from None
    if absent := [f.name for f in fields(Environment) if f.name not in content]:
        raise Fault(f"env.json lacks {', '.join(absent)}; add each, null where it is not known")
    if day.tzinfo is None:
        raise Fault(f"env.json: date {environment.date} has no time zone; end it in +00:00")
    if not folder.name.startswith(f"{day:%Y-%m-%d}-"):
        raise Fault(f"env.json says {day:%Y-%m-%d}; name the folder {day:%Y-%m-%d}-NAME, or correct the date")
    return environment


def read_tables(folder: Path) -> dict[str, Table]:
    """All figures: the tables of table.json, and metrics.jsonl as a table of that name."""
    tables, metrics = {}, folder / "metrics.jsonl"
    if not (folder / "table.json").is_file() and not metrics.is_file():
        raise Fault("table.json and metrics.jsonl are both missing; write one of them")
    if (folder / "table.json").is_file():
        try:
            tables = load_tables(read_text(folder, "table.json", "write the figures into it"))
        except (ValueError, TypeError, AttributeError) as error:
            raise Fault(f"table.json cannot be read ({error}); write it as docs/records/README.md shows") from None
    if metrics.is_file():
        tables |= {METRICS: read_metrics(metrics)}
    for name, table in tables.items():
        if not table.rows:
            raise Fault(f"table {name} has no rows; write the figures into it")
    return tables


def read_metrics(path: Path) -> Table:
    """metrics.jsonl as a table; entries without a step, such as a run's settings, are left out."""
    try:
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        entries = [entry for entry in entries if "step" in entry]
    except (ValueError, TypeError) as error:
        raise Fault(f"metrics.jsonl cannot be read ({error}); copy the run's file anew") from None
    names = dict.fromkeys(name for entry in entries for name in entry)
    return Table("Metrics of the run", dict.fromkeys(names), [[entry.get(name) for name in names] for entry in entries])


def read_words(folder: Path) -> tuple[list[Claim], list[Negative]]:
    """record.yaml: what the record claims, and what did not help. Fault where it says neither."""
    text = read_text(folder, "record.yaml", "write what the record claims, or what did not help")
    try:
        content = yaml.safe_load(text)
        unknown = set(content) - {"claims", "negative"}
        claims = [Claim(**entry) for entry in content.get("claims") or []]
        negative = [Negative(**entry) for entry in content.get("negative") or []]
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise Fault(
            f"record.yaml cannot be read ({' '.join(str(error).split())}); see docs/records/README.md"
        ) from None
    if unknown:
        raise Fault(f"record.yaml has unknown keys {sorted(unknown)}; it knows claims and negative")
    if not claims and not negative:
        raise Fault("record.yaml has neither claims nor negative; write one of them")
    return claims, negative


def claim_text(claim: Claim, tables: dict[str, Table]) -> str:
    """A claim's figures in words, a range where rows differ: `speed 633,000 to 641,000 tokens/s, MFU 52.0 %`.

    Fault where the claim names a table, a column or rows that are not there.
    """
    if claim.table not in tables:
        raise Fault(f"claim {claim.claim!r} takes table {claim.table!r}; there are {sorted(tables)}")
    table = tables[claim.table]
    named = [*claim.where, *claim.show, *([claim.by] if claim.by else [])]
    if unknown := [name for name in named if name not in table.columns]:
        raise Fault(f"claim {claim.claim!r} names columns {unknown}; table {claim.table} has {list(table.columns)}")
    rows = [row for row in table.dicts() if all(row[name] == value for name, value in claim.where.items())]
    if not rows:
        raise Fault(f"claim {claim.claim!r}: no row of table {claim.table} matches {claim.where}; correct 'where'")
    if claim.by is None:
        return figures_text(claim, table, rows)
    texts = []
    for value in dict.fromkeys(row[claim.by] for row in rows):
        name = (
            value
            if isinstance(value, str)
            else f"{label(claim.by)} {number(value)}{unit_text(table.columns[claim.by])}"
        )
        texts.append(f"{name}: {figures_text(claim, table, [row for row in rows if row[claim.by] == value])}")
    return "; ".join(texts)


def figures_text(claim: Claim, table: Table, rows: list[dict[str, Value]]) -> str:
    """The columns that a claim shows, over `rows`. A column that stands alone goes without its name."""
    parts = []
    for name in claim.show:
        values = [row[name] for row in rows if row[name] is not None]
        if not values:
            raise Fault(f"claim {claim.claim!r}: column {name} is empty in the rows that match; take another column")
        text = f"{value_range(values)}{unit_text(table.columns[name])}"
        parts.append(text if len(claim.show) == 1 else f"{label(name)} {text}")
    return ", ".join(parts)


def label(name: str) -> str:
    """A column's name as a page shows it."""
    return name.replace("_", " ")


def value_range(values: list[Value]) -> str:
    """`[2, 1, 3]` → `1 to 3`; words are listed, each once."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) == len(values):
        low, high = min(numbers), max(numbers)
        return number(low) if low == high else f"{number(low)} to {number(high)}"
    return ", ".join(dict.fromkeys(number(value) for value in values))


def number(value: Value) -> str:
    """A figure as a page shows it: thousands apart, six digits at most of a fraction, nothing as a dash.

    >>> number(633000), number(52.0), number(2.011805278), number(None), number(True)
    ('633,000', '52.0', '2.01181', '–', 'yes')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and abs(value) >= 1e4):
        return f"{value:,}"
    if isinstance(value, float):
        rounded = f"{value:.6g}"
        return str(value) if float(rounded) == value else rounded
    return value


def unit_text(unit: str | None) -> str:
    """A unit as it follows a figure."""
    return f" {unit}" if unit else ""


def read_all(folder: Path) -> tuple[list[Record], list[str]]:
    """Every record below `folder`, and a line for each fault."""
    records, faults = [], []
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        try:
            records.append(read_record(path))
        except ExceptionGroup as group:
            faults += [str(fault) for fault in group.exceptions]
    return records, faults
