"""Answers laid out in rows, and rows dealt to processes and micro-batches."""

import itertools

import numpy as np
import pytest

from nanochat_hf.rl.rows import Row, Shape, lay_out, micro_batches, needed_accumulation, rows_of


def answers(lengths, seed=0):
    draw = np.random.default_rng(seed)
    made = []
    for i, n in enumerate(lengths):
        prompt = int(draw.integers(1, n - 1)) if n > 2 else 1
        trained = tuple([False] * prompt + [bool(k % 3) or k == n - 1 for k in range(prompt, n)])
        ids = tuple(int(x) for x in draw.integers(1, 1000, n))
        made.append(Row(ids, trained, (i + 1) / 8, tuple(-0.5 * k for k in range(n)), factor=(i + 1) / 4))
    return made


def targets(batches):
    """(input, target, weight, factor, sampler's log-probability) of every target, sorted."""
    names = ("input_ids", "shift_labels", "loss_weights", "factors", "sampler_log_probs")
    found = []
    for batch in batches:
        keep = batch["shift_labels"] != -100
        found += zip(*(batch[name][keep].tolist() for name in names), strict=True)
    return sorted(found)


def written_out(rows):
    return sorted(
        (row.ids[i - 1], row.ids[i], row.weight, row.factor, row.log_probs[i])
        for row in rows
        for i in range(1, len(row.ids))
        if row.trained[i]
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("fixed", [False, True])
def test_every_target_is_somewhere_once_and_all_processes_have_as_many_rows(world_size, fixed):
    rows = answers([2, 5, 9, 9, 3, 7, 4, 8, 6, 2, 9])
    shapes = [Shape(4, 16, 2, rank, world_size, fixed) for rank in range(world_size)]
    shares = [micro_batches(rows, shape, pad=0) for shape in shapes]
    assert targets(itertools.chain(*shares)) == written_out(rows)
    assert len({tuple(batch["input_ids"].shape for batch in share) for share in shares}) == 1
    assert all(len(share) == 2 for share in shares)
    if fixed:
        assert shares[0][0]["input_ids"].shape == (4, 16)


def test_answers_of_a_row_do_not_see_each_other_and_are_numbered():
    first, second = answers([4, 3])
    batch = lay_out([[first, second], []], positions=8, pad=7)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], list(range(8))]
    assert batch["answer_ids"][0, :5].tolist() == [0, 0, 0, 1, 1]
    assert batch["input_ids"][0].tolist() == [*first.ids[:-1], *second.ids[:-1], 7, 7, 7]
    assert (batch["shift_labels"][1] == -100).all() and (batch["input_ids"][1] == 7).all()


def test_a_step_without_answers_has_batches_without_targets():
    for batch in micro_batches([], Shape(4, 16, 3), pad=0):
        assert (batch["shift_labels"] == -100).all() and batch["input_ids"].shape == (1, 16)


@pytest.mark.parametrize("longest", [5, 17, 33])
@pytest.mark.parametrize("rows, world_size", [(1, 1), (3, 2)])
def test_any_answers_fit_the_micro_batches_that_are_planned(longest, rows, world_size):
    count, draw = 40, np.random.default_rng(longest)
    accumulation = needed_accumulation(count, longest, 32, rows, world_size)
    for lengths in ([longest] * count, draw.integers(2, longest + 1, count).tolist(), [2] * 20 + [longest] * 20):
        assert len(micro_batches(answers(lengths), Shape(rows, 32, accumulation, 0, world_size), 0)) == accumulation


def test_few_sizes_of_a_micro_batch():
    shape = Shape(32, 64, 2)
    sizes = [rows_of(planned, shape) for planned in range(65)]
    assert sizes == sorted(sizes) and set(sizes) == set(range(4, 33, 4))
    assert all(size * 2 >= planned for planned, size in enumerate(sizes))
