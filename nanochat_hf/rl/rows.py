"""Answers with weights → packed rows → micro-batches, as the trainer takes them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nanochat_hf.packing import plan_rows

Batch = dict[str, torch.Tensor]
STEPS_OF_ROWS = 8  # sizes of a micro-batch: multiples of an eighth of the largest, so that few are compiled


@dataclass(frozen=True)
class Row:
    """One answer to train on, prompt included.

    `trained` says which of `ids` the model shall learn from; `weight` is their advantage times `factor`, which the
    normalisation makes; `log_probs` are the sampler's, 0 where none is known.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    weight: float
    log_probs: tuple[float, ...]
    factor: float = 1.0

    @property
    def positions(self) -> int:
        """Places that it takes in a row: the last token is a target only."""
        return len(self.ids) - 1


@dataclass(frozen=True)
class Shape:
    """Micro-batches of this process: `accumulation` of up to `rows` rows of `positions`, of `world_size` processes."""

    rows: int
    positions: int
    accumulation: int
    rank: int = 0
    world_size: int = 1
    fixed: bool = False  # always `rows` rows, as XLA needs it

    @property
    def most(self) -> int:
        """Rows that a step can hold on all processes."""
        return self.rows * self.accumulation * self.world_size


def needed_accumulation(answers: int, longest: int, positions: int, rows: int, world_size: int) -> int:
    """Micro-batches that hold any `answers` answers of up to `longest` ids, prompt included.

    >>> needed_accumulation(256, longest=513, positions=2048, rows=16, world_size=1)  # four answers a row
    4
    """
    each = positions // (longest - 1)  # best fit leaves no row but the last with fewer
    return math.ceil(math.ceil(answers / each) / (rows * world_size))


def micro_batches(answers: Sequence[Row], shape: Shape, pad: int) -> list[Batch]:
    """This process's micro-batches of a step, of which every process has as many, with as many rows.

    Rows that only fill up have no targets. `answer_ids` number the answers of a micro-batch.
    """
    plan = plan_rows([answer.positions for answer in answers], shape.positions) if answers else []
    if len(plan) > shape.most:
        raise AssertionError(f"{len(plan)} rows for {shape.most}")  # `needed_accumulation` counts on the longest
    size = shape.rows if shape.fixed else rows_of(len(plan), shape)
    own = plan[shape.rank :: shape.world_size]
    own += [[]] * (size * shape.accumulation - len(own))
    return [
        lay_out([[answers[i] for i in row] for row in own[start : start + size]], shape.positions, pad)
        for start in range(0, len(own), size)
    ]


def rows_of(planned: int, shape: Shape) -> int:
    """Rows of each micro-batch for a plan of so many rows: as few as hold it, by eighths of the largest number."""
    needed = -(-planned // (shape.world_size * shape.accumulation))
    unit = -(-shape.rows // STEPS_OF_ROWS)
    return min(shape.rows, max(1, -(-needed // unit)) * unit)


def lay_out(rows: Sequence[Sequence[Row]], positions: int, pad: int) -> Batch:
    """Rows of answers → {input_ids, shift_labels, position_ids, loss_weights, factors, sampler_log_probs, answer_ids}.

    All (B, positions). Positions begin anew with each answer and with the padding after the last, as documents do.

    >>> row = Row(ids=(1, 2, 3, 4), trained=(False, False, True, True), weight=0.5, log_probs=(0, 0, -1.0, -2.0))
    >>> batch = lay_out([[row]], positions=5, pad=9)
    >>> batch["input_ids"].tolist(), batch["shift_labels"].tolist(), batch["position_ids"].tolist()
    ([[1, 2, 3, 9, 9]], [[-100, 3, 4, -100, -100]], [[0, 1, 2, 0, 1]])
    >>> batch["loss_weights"].tolist(), batch["sampler_log_probs"].tolist()
    ([[0.0, 0.5, 0.5, 0.0, 0.0]], [[0.0, -1.0, -2.0, 0.0, 0.0]])
    """
    shape = (len(rows), positions)
    ids, labels = np.full(shape, pad, np.int64), np.full(shape, -100, np.int64)
    places, numbers = np.tile(np.arange(positions), (len(rows), 1)), np.zeros(shape, np.int64)
    weights, factors, scores = (np.zeros(shape, np.float32) for _ in range(3))
    number = 0
    for r, row in enumerate(rows):
        start = 0
        for answer in row:
            stop = start + answer.positions
            trained, span = np.array(answer.trained[1:], dtype=bool), slice(start, stop)
            ids[r, span] = answer.ids[:-1]
            labels[r, span] = np.where(trained, answer.ids[1:], -100)
            weights[r, span] = np.where(trained, answer.weight, 0.0)
            factors[r, span] = np.where(trained, answer.factor, 0.0)
            scores[r, span] = np.where(trained, answer.log_probs[1:], 0.0)
            places[r, start:] = np.arange(positions - start)
            numbers[r, span] = number
            start, number = stop, number + 1
        places[r, start:] = np.arange(positions - start)
    named = {
        "input_ids": ids,
        "shift_labels": labels,
        "position_ids": places,
        "loss_weights": weights,
        "factors": factors,
        "sampler_log_probs": scores,
        "answer_ids": numbers,
    }
    return {name: torch.from_numpy(value) for name, value in named.items()}
