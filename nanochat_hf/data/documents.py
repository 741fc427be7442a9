"""Stop 3: the tokenised conversations of a mixture as documents.

The tokens stay in the Arrow file, and a document is a view into it. Documents longer than a row are cut, split or
dropped by the policy of `overlong`.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np

from .overlong import Fit
from .reports import SourceReport
from .sources import SourceConfig
from .tokenising import SEPARATOR

if TYPE_CHECKING:  # datasets is imported where it is used
    from datasets import Dataset

Values = np.ndarray | list  # one value for each token; the state of a stream holds lists


class Document(TypedDict):
    """A document of T tokens: `ids` int32 (T,), `mask` uint8 (T,), and `factors` float32 (T,) where some are not 1.

    Every token is a target where the mask is None or missing.
    """

    ids: Values
    mask: NotRequired[Values | None]
    factors: NotRequired[Values]


class TokenColumns:
    """Views into the Arrow file of a tokenised source: no copy, no Python list.

    `lengths` and `trained` count tokens per conversation.
    """

    def __init__(self, dataset: "Dataset") -> None:
        self.dataset = dataset
        self._open()
        self.lengths = np.concatenate([np.diff(offsets) for offsets, _, _ in self.chunks]).astype(np.int64)
        self.trained = np.concatenate([trained_tokens(offsets, mask) for offsets, _, mask in self.chunks])
        self.weighted = any(len(column.values) for column in self._factors)
        self.fractional = self.weighted and not all(
            np.isin(column.values.to_numpy(), (0, 1)).all() for column in self._factors
        )

    def _open(self) -> None:
        columns = [self.dataset.data.column(name).chunks for name in ("ids", "mask", "factors")]
        kept = [(i, m, f) for i, m, f in zip(*columns, strict=True) if len(i)]
        self.chunks = [(i.offsets.to_numpy(), i.values.to_numpy(), m.values.to_numpy()) for i, m, _ in kept]
        self._factors = [f for _, _, f in kept]
        sizes = [len(i) for i, _, _ in kept]
        self.chunk = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        self.first = np.concatenate(([0], np.cumsum(sizes)))

    def __getstate__(self) -> dict[str, Any]:  # without the views: a worker that is not forked maps the file itself
        return {name: self.__dict__[name] for name in ("dataset", "lengths", "trained", "weighted", "fractional")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32, mask uint8) of one conversation."""
        chunk = self.chunk[number]
        offsets, ids, mask = self.chunks[chunk]
        place = number - self.first[chunk]
        part = slice(offsets[place], offsets[place + 1])
        return ids[part], mask[part]

    def factors(self, number: int) -> np.ndarray | None:
        """float32 (T,) of one conversation; None where every token counts 1."""
        if not self.weighted:
            return None
        chunk = self.chunk[number]
        values = self._factors[chunk][int(number - self.first[chunk])].values
        return values.to_numpy() if len(values) else None

    def bad(self) -> tuple[int, str]:
        """(number of bad rows, why the first is bad)."""
        count = int((self.lengths == 0).sum())  # any conversation has at least its <|bos|>
        return count, next(filter(None, self.dataset["bad"]), "") if count else ""

    def ignored(self) -> dict[str, int]:
        """{column that was not used: number of rows that hold something in it}."""
        found: Counter[str] = Counter()
        for entry in self.dataset.data.column("ignored").value_counts().to_pylist():
            for name in filter(None, entry["values"].split(SEPARATOR)):
                found[name] += entry["counts"]
        return dict(found)


def trained_tokens(offsets: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The sum of `mask` over each row; row r is mask[offsets[r] : offsets[r + 1]].

    >>> trained_tokens(np.array([0, 2, 2, 3]), np.array([0, 1, 1])).tolist()
    [1, 0, 1]
    """
    return np.diff(np.concatenate(([0], np.cumsum(mask, dtype=np.int64)))[offsets])


class Documents(Sequence):
    """Every document of a mixture, as often as its source is repeated: documents[i] → Document."""

    def __init__(self, fit: Fit, seed: int = 0) -> None:
        self.fit, self.seed = fit, seed
        self.columns: list[TokenColumns] = []
        self.reports: list[SourceReport] = []
        self.spans = np.zeros((0, 4), dtype=np.int64)  # source, conversation, start, stop

    def add(self, source: SourceConfig, dataset: "Dataset", form: str, unread: Sequence[str] = ()) -> SourceReport:
        """Add the documents of a tokenised source; returns its SourceReport."""
        columns = TokenColumns(dataset)
        report = SourceReport(source.label, form, source.copies, seen=len(columns.lengths), unread=list(unread))
        report.bad, report.first_bad = columns.bad()
        report.check_bad()
        report.ignored = columns.ignored()
        number = len(self.columns)
        long = columns.lengths > self.fit.capacity
        keep = np.flatnonzero(~long & (columns.lengths > 0) & (self.fit.all_tokens | (columns.trained > 0)))
        report.untrained = int((~long).sum()) - len(keep) - report.bad
        spans = [np.stack((np.full(len(keep), number), keep, np.zeros_like(keep), columns.lengths[keep]), axis=1)]
        trained = [columns.trained[keep]]
        for row in np.flatnonzero(long):  # one by one: few are long, and only they need the policy
            ids, mask = columns.row(row)
            for a, b in self.fit.spans(ids, mask, report):
                spans.append(np.array([[number, row, a, b]]))
                trained.append(np.array([mask[a:b].sum()]))
        every, targets = np.concatenate(spans).astype(np.int64), np.concatenate(trained)
        chosen = self._copies(len(every), source.copies, number)
        self.spans = np.concatenate((self.spans, every[chosen]))
        self.columns.append(columns)
        report.conversations, report.trained = len(chosen), int(targets[chosen].sum())
        report.tokens = int(_lengths(every[chosen]).sum())
        self.reports.append(report)
        return report

    def _copies(self, count: int, copies: float, number: int) -> np.ndarray:
        whole, part = divmod(copies, 1)
        chosen = np.tile(np.arange(count), int(whole))
        if part:
            some = np.random.default_rng((self.seed, number)).permutation(count)[: round(part * count)]
            chosen = np.concatenate((chosen, np.sort(some)))
        return chosen

    @property
    def weighted(self) -> bool:
        """Whether batches need loss_weights: the mask of targets cannot say all the factors."""
        return any(columns.fractional or (self.fit.all_tokens and columns.weighted) for columns in self.columns)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 (len(documents),)."""
        return _lengths(self.spans)

    @property
    def digest(self) -> str:
        """Changes with the documents, their order and their lengths."""
        return hashlib.sha256(np.ascontiguousarray(self.spans).tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: Any) -> Any:
        number, row, start, stop = self.spans[index]
        columns = self.columns[number]
        ids, mask = columns.row(row)
        return piece(ids, mask, columns.factors(row), (start, stop), self.fit)


def piece(ids: np.ndarray, mask: np.ndarray, factors: np.ndarray | None, span: Sequence[int], fit: Fit) -> Document:
    """One part of a rendered conversation as a Document; a later part gets a bos of its own."""
    start, stop = span
    ids, mask = ids[start:stop], mask[start:stop]
    if factors is not None and not fit.all_tokens and np.isin(factors, (0, 1)).all():
        factors = None  # the mask says it all
    factors = None if factors is None else factors[start:stop]
    if start:
        ids, mask = np.concatenate(([fit.bos], ids)).astype(np.int32), np.concatenate(([0], mask)).astype(np.uint8)
        factors = None if factors is None else np.concatenate((np.ones(1, np.float32), factors))
    document: Document = {"ids": ids, "mask": None if fit.all_tokens else mask}
    if factors is not None:
        document["factors"] = factors
    return document


def _lengths(spans: np.ndarray) -> np.ndarray:
    return spans[:, 3] - spans[:, 2] + (spans[:, 2] > 0)
