"""Plain text: which rows a source has, and the texts in them."""

import copy
from collections.abc import Iterable, Iterator, Sequence

from nanochat_hf.files.data_file import Raw
from nanochat_hf.files.rows import TableRows
from nanochat_hf.messages import surrogate

from .loading import load_shards, load_source, unread
from .reports import ENOUGH, SourceReport, check_policy
from .sources import SourceConfig
from .workers import check_stopped


def text_of(raw: Raw, column: str) -> str:
    """The text in `column` of a row; ValueError with the row's place where there is none that can be encoded."""
    row = raw.parsed()
    if not isinstance(row, dict) or column not in row:
        has = ", ".join(map(str, row)) if isinstance(row, dict) else f"no columns but {type(row).__name__}"
        raise ValueError(f"{raw.place}: no column {column!r}; it has {has}")
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(f"{raw.place}: {column!r} holds {type(text).__name__}; remove the row or give it text")
    if fault := surrogate(text):
        raise ValueError(f"{raw.place}: {fault}")
    return text


class Texts:
    """The texts of a source in order; each iteration reads them from the start.

    `streaming` reads them without loading all of them first. With `bad_rows` "skip" rows without text are left out and
    counted in `report`, up to half of the rows. With "error" the first one is a ValueError. It is raised by the
    constructor, which looks at all rows, but at the first row alone of a stream.
    """

    def __init__(
        self, source: SourceConfig, column: str = "text", *, streaming: bool = False, bad_rows: str = "error"
    ) -> None:
        check_policy(bad_rows)
        self.source, self.column, self.skip = source, (source.columns or {}).get(column, column), bad_rows == "skip"
        self.report = SourceReport(source.label, "", source.copies, unread=unread(source))
        self.rows = None if streaming else load_source(source)
        self.shards = load_shards(source) if streaming else []
        self._check()

    def raws(self) -> Iterator[Raw]:
        """The rows as they are in their files."""
        if self.rows is not None:
            return (self.rows.raw(i) for i in range(len(self.rows)))
        return (row for shard in self.shards for _, row in shard.rows())

    def text(self, raw: Raw) -> str | None:
        """The text of a row, counted in the report; None for a bad row that is left out."""
        self.report.seen += 1
        try:
            text = text_of(raw, self.column)
        except ValueError as error:
            self.report.add_bad(error, self.skip)
            if self.report.seen >= ENOUGH:
                self.report.check_bad()
            return None
        self.report.conversations += 1
        return text

    def __iter__(self) -> Iterator[str]:
        for raw in self.raws():
            check_stopped()
            if (text := self.text(raw)) is not None:
                yield text
        self.report.check_bad()

    @property
    def reports(self) -> list[SourceReport]:
        """The report, as a mixture has several."""
        return [self.report]

    def recall(self, reports: Sequence[SourceReport]) -> None:
        """Go on counting from `reports`, as `reports` gives them."""
        [self.report] = reports

    def fresh(self) -> "Texts":
        """The same texts with a report of their own."""
        fresh = copy.copy(self)
        fresh.report = copy.deepcopy(self.report)
        return fresh

    def nothing(self) -> ValueError:
        """The error for data in which every text is empty."""
        return ValueError(f"{self.source.label}: no text in {self.column!r}, all is empty; give another column or data")

    def _check(self) -> None:
        """Raise ValueError for faults that can be seen before training.

        These are a missing column, its type, its nulls, and any line of a text file without text.
        """
        first = next(self.raws(), None)
        if first is None:
            raise ValueError(f"{self.source.label}: no rows there; check the data, and the rows left out at its start")
        if isinstance(first.value, dict):
            self.report.ignored = {}
            others = [name for name in first.value if name != self.column]
            if self.column in first.value and others and self.rows is not None:
                self.report.ignored = dict.fromkeys(others, len(self.rows))
        if isinstance(self.rows, TableRows):
            if self.column not in self.rows.dataset.column_names:
                text_of(first, self.column)
            empty = self.rows.dataset.data.column(self.column).null_count
            if self.rows.places.ranges != ((0, len(self.rows.dataset)),):
                empty = 0  # this counts rows that were not selected too; rows are checked again when they are read
            if empty and not self.skip:
                raise ValueError(
                    f"{self.source.label}: {empty} rows hold nothing in {self.column!r}; remove them or give them text"
                )
            if first.value[self.column] is not None:
                text_of(first, self.column)
        elif not self.skip:
            for raw in [first] if self.rows is None else self.raws():
                text_of(raw, self.column)


class MixedTexts:
    """Texts of several sources in proportion to their weights, counted in documents; a row is (number of source, row).

    An iteration takes each text once: the next comes from the source with the fewest so far for its weight, until that
    one has no more.
    """

    def __init__(self, parts: Sequence[Texts]) -> None:
        self.parts = list(parts)

    @property
    def reports(self) -> list[SourceReport]:
        """The report of each source."""
        return [part.report for part in self.parts]

    def recall(self, reports: Sequence[SourceReport]) -> None:
        """As Texts.recall."""
        for part, report in zip(self.parts, reports, strict=True):
            part.report = report

    def fresh(self) -> "MixedTexts":
        """The same texts with reports of their own."""
        return MixedTexts([part.fresh() for part in self.parts])

    def text(self, row: tuple[int, Raw]) -> str | None:
        """As Texts.text."""
        number, raw = row
        return self.parts[number].text(raw)

    def __iter__(self) -> Iterator[str]:
        going = {number: iter(part) for number, part in enumerate(self.parts)}
        taken = [0] * len(self.parts)
        while going:
            number = min(going, key=lambda i: ((taken[i] + 1) / self.parts[i].source.copies, i))
            text = next(going[number], None)
            if text is None:
                del going[number]
            else:
                taken[number] += 1
                yield text

    def nothing(self) -> ValueError:
        """As Texts.nothing."""
        return self.parts[0].nothing()


def shortened(texts: Iterable[str], document_chars: int | None = None, max_chars: int | None = None) -> Iterator[str]:
    """The texts, each cut to `document_chars` characters, until they have `max_chars` characters in all.

    >>> list(shortened(["abcd", "ef", "g"], 3, 4))
    ['abc', 'e']
    """
    left = float("inf") if max_chars is None else max_chars
    for text in texts:
        text = text[:document_chars]
        text = text if len(text) <= left else text[: int(left)]
        left -= len(text)
        yield text
        if left <= 0:
            return
