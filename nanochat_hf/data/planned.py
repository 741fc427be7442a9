"""Stop 6a: micro-batches of conversations whose rows are all planned before the first step, with exact state."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from nanochat_hf.conversation import PlainEncoder

from .batches import without_targets
from .collate import Batch, PackingCollator
from .documents import Document, Documents
from .loading import unread
from .overlong import Fit
from .packing import Plan, plan
from .reports import DataReport, Reported, check_policy
from .sources import SourceConfig
from .tokenising import tokenise
from .workers import ahead, first, plain_errors, worker_loader


class PlannedRows:
    """The rows of all epochs: planned[g] is row g of the run, with the n rows of the plan in each epoch.

    Row g is row g % n of epoch g // n. The seed and the epoch decide the order within an epoch.
    """

    def __init__(self, documents: Documents, plan: Plan, seed: int) -> None:
        self.documents, self.plan, self.seed = documents, plan, seed
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)

    def __getitem__(self, g: int) -> list[Document]:
        epoch, index = divmod(g, len(self.plan))
        if self._epoch != epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self.plan))
            self._epoch = epoch
        return [self.documents[i] for i in self.plan[self._order[index]]]


class SFTBatches(Reported):
    """Endless micro-batches of packed conversations.

    All rows of an epoch are planned before the first step. The state is the number of the run's next row, so a run may
    resume on another number of processes.

    `overlong` is truncate, split (before a user's message) or drop. `bad_rows` is error, or skip, which leaves out and
    counts rows that are no conversation. `num_workers` processes collate; with 0 a thread does it. Either keeps
    `prefetch` batches ready; a thread with prefetch 0 keeps none. `num_proc` processes tokenise. ValueError for any
    fault of the data, before the first batch.
    """

    def __init__(  # noqa: PLR0913 - a run has a flag for each, given by name
        self,
        sources: Sequence[SourceConfig],
        tokenizer: PreTrainedTokenizerBase,
        *,
        rows: int,
        positions: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        train_on_all_tokens: bool = False,
        isolate: bool = True,
        progress: bool = False,
        overlong: str = "truncate",
        bad_rows: str = "error",
        num_proc: int | None = None,
        num_workers: int = 0,
        prefetch: int = 2,
    ) -> None:
        self.rows, self.rank, self.world_size = rows, rank, world_size
        self.num_workers, self.prefetch = num_workers, prefetch
        check_policy(bad_rows)
        encoder, capacity = PlainEncoder(tokenizer), positions + 1
        special = encoder.special
        self.documents = Documents(
            Fit(capacity, special["<|bos|>"], special["<|user_start|>"], overlong, train_on_all_tokens), seed
        )
        for source in sources:
            tokens, form = tokenise(source, encoder, num_proc=num_proc, progress=progress, bad_rows=bad_rows)
            told = self.documents.add(source, tokens, form, unread(source))
            if progress:
                print(told, flush=True)
        if not len(self.documents):
            raise self.report.nothing(positions)
        lengths = self.documents.lengths
        self.plan = plan(lengths, capacity)
        self.num_rows = len(self.plan)
        self.padding_share = 1 - int(lengths.sum()) / (self.num_rows * capacity)
        self.planned = PlannedRows(self.documents, self.plan, seed)
        self.collate = PackingCollator(positions, tokenizer.pad_token_id, isolate, self.documents.weighted)
        self.next_row = 0

    @property
    def report(self) -> DataReport:
        """What became of the rows, for an epoch."""
        return DataReport(self.documents.reports)

    @property
    def epoch(self) -> float:
        """Passes over the data so far, with a fraction for the present one."""
        return self.next_row / self.num_rows

    def steps(self, epochs: float, accumulation: int) -> int:
        """The number of optimizer steps that comes closest to `epochs`, at least 1.

        A step takes `accumulation` micro-batches on every process.
        """
        return max(1, round(epochs * self.num_rows / self.rows_per_step(accumulation)))

    def passes(self, steps: int, accumulation: int) -> float:
        """The number of epochs in `steps` optimizer steps."""
        return steps * self.rows_per_step(accumulation) / self.num_rows

    def rows_per_step(self, accumulation: int) -> int:
        """Rows of an optimizer step on all processes."""
        return self.rows * self.world_size * accumulation

    def _row_numbers(self, first: int) -> Iterator[list[int]]:
        while True:
            yield list(range(first + self.rank * self.rows, first + (self.rank + 1) * self.rows))
            first += self.rows * self.world_size

    def __iter__(self) -> Iterator[Batch]:
        numbers = self._row_numbers(self.next_row)
        if self.num_workers:
            loader = worker_loader(
                self.planned,
                num_workers=self.num_workers,
                collate=self.collate,
                batch_sampler=numbers,
                prefetch=self.prefetch,
            )
            made = plain_errors(loader)
        else:
            made = ahead((self.collate([self.planned[g] for g in row]) for row in numbers), self.prefetch)
        for batch in made:
            self.next_row += self.rows * self.world_size
            yield batch

    def take(self, count: int) -> list[Batch]:
        """The next `count` micro-batches."""
        return first(self, count)

    def once(self, count: int) -> list[Batch]:
        """The first `count` micro-batches of an epoch, fewer where it has fewer: a validation set.

        No row counts twice: rows that only fill up the last batch have no targets.
        """
        batches = first(self, min(count, -(-self.num_rows // self.rows)))
        without_targets(batches[-1], len(batches) * self.rows - self.num_rows)
        return batches

    def state_dict(self) -> dict[str, Any]:
        """The number of the run's next row, and the identity of the data."""
        return {
            "next_row": self.next_row,
            "num_rows": self.num_rows,
            "documents": self.documents.digest,
            "seed": self.planned.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at `state`; ValueError where the data is not the same."""
        if state["num_rows"] != self.num_rows or state.get("documents", self.documents.digest) != self.documents.digest:
            raise ValueError(
                f"the checkpoint's data has {state['num_rows']} rows, this run's {self.num_rows}"
                f"{'' if state['num_rows'] != self.num_rows else ' of other documents'}; resume with the same recipe"
            )
        if state.get("seed", self.planned.seed) != self.planned.seed:
            raise ValueError(
                f"the checkpoint's rows are shuffled by seed {state['seed']}, this run's by {self.planned.seed}; "
                "give that seed"
            )
        place = state["next_row"]
        if not isinstance(place, int) or isinstance(place, bool) or place < 0:
            raise ValueError(f"the checkpoint's next_row is {place!r}, no row of the data; give an older checkpoint")
        self.next_row = place
