"""Data sets → tokenised documents → planned rows → micro-batches of this rank, with exact state.

SFTBatches plans whole epochs of conversations; TextBatches and StreamedConversations pack endless windows. All are iterables of batches (see
collate.py) whose state_dict is that of the batches handed out, however many are made ahead.
"""

import numpy as np

from nanochat_hf.conversation import PlainEncoder

from .collate import PackingCollator
from .documents import Documents, tokenise
from .packing import plan_rows
from .reports import check_policy
from .workers import ahead, first, plain_errors, worker_loader


class PlannedRows:
    """The rows of all epochs: row g of the run is row g % n of epoch g // n, whose order the seed and the epoch decide."""

    def __init__(self, documents, plan, seed):
        self.documents, self.plan, self.seed, self._order = documents, plan, seed, (None, None)

    def __getitem__(self, g):
        epoch, index = divmod(g, len(self.plan))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.plan)))
        return [self.documents[i] for i in self.plan[self._order[1][index]]]


class SFTBatches:
    """Endless micro-batches of packed conversations. All rows of an epoch are planned before the first step; the state is the number of
    the run's next row, and holds on any number of processes.

    `overlong` is truncate, split (before a user's message) or drop; `bad_rows` error, or skip, which leaves out and counts rows that are no
    conversation. `num_workers` processes collate; with 0 a thread does, `prefetch`
    batches ahead (0: none). `num_proc` processes tokenise. ValueError for whatever is wrong with the data, before the first batch.
    """

    def __init__(
        self,
        sources,
        tokenizer,
        *,
        rows,
        positions,
        rank=0,
        world_size=1,
        seed=0,
        train_on_all_tokens=False,
        isolate=True,
        progress=False,
        overlong="truncate",
        bad_rows="error",
        num_proc=None,
        num_workers=0,
        prefetch=2,
    ):
        self.rows, self.rank, self.world_size = rows, rank, world_size
        self.num_workers, self.prefetch = num_workers, prefetch
        check_policy(bad_rows)
        encoder, capacity = PlainEncoder(tokenizer), positions + 1
        self.documents = Documents(
            capacity,
            encoder.special["<|bos|>"],
            encoder.special["<|user_start|>"],
            overlong=overlong,
            train_on_all_tokens=train_on_all_tokens,
            seed=seed,
        )
        for source in sources:
            report = self.documents.add(
                source, *tokenise(source, encoder, num_proc=num_proc, progress=progress, bad_rows=bad_rows)
            )
            if progress:
                print(report, flush=True)
        self.reports = self.documents.reports
        if not len(self.documents):
            raise ValueError(
                f"no conversation has an assistant turn that fits the row of {positions} positions; nothing could be trained on "
                f"({', '.join(f'{r.untrained} without a target, {r.dropped} dropped in {r.label}' for r in self.reports)})"
            )
        lengths = self.documents.lengths.tolist()
        self.plan = plan_rows(lengths, capacity)
        self.num_rows = len(self.plan)
        self.padding_share = 1 - sum(lengths) / (self.num_rows * capacity)
        self.planned = PlannedRows(self.documents, self.plan, seed)
        self.collate = PackingCollator(positions, tokenizer.pad_token_id, isolate)
        self.next_row = 0

    @property
    def truncated(self):
        """Conversations that lost their end."""
        return sum(report.truncated for report in self.reports)

    @property
    def bad(self):
        """(rows left out because they are no conversation, why the first was)."""
        return sum(report.bad for report in self.reports), next(
            (report.first_bad for report in self.reports if report.bad), ""
        )

    @property
    def untrained(self):
        """Documents left out because no target is in them."""
        return sum(report.untrained for report in self.reports)

    @property
    def epoch(self):
        """Epochs gone by, as a float."""
        return self.next_row / self.num_rows

    def steps_per_epoch(self, accumulation):
        """Optimizer steps that see every row once."""
        return -(-self.num_rows // (self.rows * self.world_size * accumulation))

    def _row_numbers(self, first):
        while True:
            yield list(range(first + self.rank * self.rows, first + (self.rank + 1) * self.rows))
            first += self.rows * self.world_size

    def __iter__(self):
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

    def take(self, count):
        """The next `count` micro-batches as a list: a validation set."""
        return first(self, count)

    def once(self, count):
        """The first `count` micro-batches of an epoch, fewer where it has fewer: a validation set in which no row counts twice. What fills up
        the last one has no target."""
        batches = first(self, min(count, -(-self.num_rows // self.rows)))
        beyond = len(batches) * self.rows - self.num_rows
        if beyond > 0:
            batches[-1]["shift_labels"][-beyond:] = -100
        return batches

    def state_dict(self):
        """The run's next row, and what tells this data from other data."""
        return {
            "next_row": self.next_row,
            "num_rows": self.num_rows,
            "documents": self.documents.digest,
            "seed": self.planned.seed,
        }

    def load_state_dict(self, state):
        """Continue there; ValueError when the data is not the same."""
        if state["num_rows"] != self.num_rows or state.get("documents", self.documents.digest) != self.documents.digest:
            raise ValueError(
                f"the checkpoint's data has {state['num_rows']} rows, this run's {self.num_rows}"
                f"{'' if state['num_rows'] != self.num_rows else ' of other documents'}; resume with the same recipe"
            )
        if state.get("seed", self.planned.seed) != self.planned.seed:
            raise ValueError(
                f"the checkpoint's rows are shuffled by seed {state['seed']}, this run's by {self.planned.seed}; give that seed"
            )
        place = state["next_row"]
        if not isinstance(place, int) or isinstance(place, bool) or place < 0:
            raise ValueError(f"the checkpoint's next_row is {place!r}, no row of the data; give an older checkpoint")
        self.next_row = place
