"""What became of the rows of each source, counted the same way for planned and streamed data.

A row that is no conversation is an error, or is left out and counted. If more than half of the rows are bad, that is an
error in any case.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

BAD_ROWS = ("error", "skip")
ENOUGH = 100  # rows of a stream that must be read before the share of bad ones means anything
FORM_NAMES = {"list": "lists of messages", "task": "a task's rows"}
TREATED = {
    "truncated": "truncated",
    "split": "split",
    "dropped": "dropped as too long",
    "untrained": "without a target left out",
}


@dataclass
class SourceReport:
    """The counts of one source.

    `conversations` (documents), `tokens` and `trained` tokens are those of an epoch; of a stream, those so far.
    `truncated`, `split`, `dropped` and `untrained` count what TREATED says. `seen` counts rows, `bad` the rows that
    are no conversation. `ignored` is {column that was not used: rows}, `unread` names files that were not read.
    """

    label: str
    form: str = ""
    copies: float = 1
    conversations: int = 0
    tokens: int = 0
    trained: int = 0
    truncated: int = 0
    split: int = 0
    dropped: int = 0
    untrained: int = 0
    seen: int = 0
    bad: int = 0
    first_bad: str = ""
    ignored: dict[str, int] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    def add_bad(self, error: Exception, skip: bool) -> None:
        """Count a bad row with `skip`; raise its error without."""
        if not skip:
            raise error
        self.bad += 1
        self.first_bad = self.first_bad or str(error)

    def check_bad(self) -> None:
        """ValueError where more than half of the rows are bad."""
        if 2 * self.bad > self.seen:
            raise ValueError(
                f"{self.label}: {self.bad:,} of {self.seen:,} rows are bad, more than half; correct the data (the "
                f"first: {self.first_bad})"
            )

    def __str__(self) -> str:
        treated = [f"{getattr(self, k):,} {text}" for k, text in TREATED.items() if getattr(self, k)]
        treated += [f"{self.bad:,} bad rows left out (the first: {self.first_bad})"] if self.bad else []
        treated += [f"ignored columns: {counted(self.ignored)}"] if self.ignored else []
        treated += [f"{len(self.unread)} files not read: {', '.join(self.unread[:3])}"] if self.unread else []
        form = f"read as {FORM_NAMES.get(self.form, self.form)}, " if self.form else ""
        return f"{self.label}: {form}{', '.join([f'{self.conversations:,} documents', *treated])}"


def counted(numbers: dict[str, int]) -> str:
    """{name: number of rows} in words, the largest number first.

    >>> counted({"score": 5, "url": 1200})
    'url (1,200 rows), score (5 rows)'
    """
    ordered = sorted(numbers.items(), key=lambda entry: (-entry[1], entry[0]))
    return ", ".join(f"{name} ({number:,} rows)" for name, number in ordered)


class DataReport(Sequence):
    """The reports of all sources of a run, and what they say together."""

    def __init__(self, sources: Iterable[SourceReport]) -> None:
        self.sources = list(sources)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: Any) -> Any:
        return self.sources[index]

    def total(self, name: str) -> int:
        """The sum of a count over the sources."""
        return sum(getattr(report, name) for report in self.sources)

    @property
    def first_bad(self) -> str:
        """Why the first bad row is bad; "" where no row is."""
        return next((report.first_bad for report in self.sources if report.bad), "")

    @property
    def ignored(self) -> dict[str, int]:
        """{column that was not used: rows}, over all sources."""
        total: Counter[str] = Counter()
        for report in self.sources:
            total.update(report.ignored)
        return dict(total)

    @property
    def left_out(self) -> str:
        """What was cut, left out or ignored, in words; "" where nothing was."""
        parts = [f"{self.total(name):,} {text}" for name, text in TREATED.items() if self.total(name)]
        if self.total("bad"):
            parts.append(f"{self.total('bad'):,} bad rows left out (the first: {self.first_bad})")
        if self.ignored:
            parts.append(f"ignored columns: {counted(self.ignored)}")
        unread = [name for report in self.sources for name in report.unread]
        if unread:
            parts.append(f"{len(unread)} files not read: {', '.join(unread[:3])}")
        return ", ".join(parts)

    def nothing(self, positions: int) -> ValueError:
        """The error of data that gives no document to train on."""
        each = ", ".join(f"{r.untrained} without a target, {r.dropped} dropped in {r.label}" for r in self.sources)
        return ValueError(
            f"no conversation has an assistant turn that fits the row of {positions} positions; nothing could be "
            f"trained on ({each})"
        )

    def state(self) -> list[dict[str, Any]]:
        """The reports as plain values, to travel from a worker with its batches."""
        return [asdict(report) for report in self.sources]

    @classmethod
    def merged(cls, states: Iterable[Sequence[dict[str, Any]]]) -> "DataReport":
        """The sum of what several workers have counted, each a `state`."""
        sources: list[SourceReport] = []
        for state in states:
            for number, values in enumerate(state):
                if number == len(sources):
                    sources.append(SourceReport(**values))
                    continue
                whole = sources[number]
                for name in ("conversations", "tokens", "trained", *TREATED, "seen", "bad"):
                    setattr(whole, name, getattr(whole, name) + values[name])
                whole.first_bad = whole.first_bad or values["first_bad"]
                whole.ignored = dict(Counter(whole.ignored) + Counter(values["ignored"]))
        return cls(sources)


class Reported(ABC):
    """The properties of planned and of streamed batches that read `report`."""

    @property
    @abstractmethod
    def report(self) -> DataReport:
        """What became of the rows."""

    @property
    def reports(self) -> list[SourceReport]:
        """The report of each source."""
        return self.report.sources

    @property
    def truncated(self) -> int:
        """Conversations that lost their end."""
        return self.report.total("truncated")

    @property
    def untrained(self) -> int:
        """Documents left out because no target is in them."""
        return self.report.total("untrained")

    @property
    def bad(self) -> tuple[int, str]:
        """(number of rows left out because they are no conversation, why the first of them is none)."""
        return self.report.total("bad"), self.report.first_bad


def check_policy(policy: str) -> None:
    """ValueError where there is no such policy."""
    if policy not in BAD_ROWS:
        raise ValueError(f"--bad-rows {policy} is unknown; choose from {', '.join(BAD_ROWS)}")
