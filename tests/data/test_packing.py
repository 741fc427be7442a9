"""plan_rows and pack_window: nothing is lost, rows are full, and a million lengths are planned in seconds."""

import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_hf.data.packing import pack_window, plan_rows


def test_plan_rows_as_documented():
    assert plan_rows([5, 3, 2], capacity=5) == [[0], [1, 2]]
    assert plan_rows([], 5) == []


@pytest.mark.parametrize(("lengths", "fault"), [([3, 6], r"lengths\[1\]=6"), ([0], r"lengths\[0\]=0")])
def test_a_length_that_has_no_place_is_named(lengths, fault):
    with pytest.raises(ValueError, match=f"{fault} must be between 1 and the row's capacity 5"):
        plan_rows(lengths, 5)


@given(st.lists(st.integers(1, 30), max_size=60))
def test_best_fit_never_opens_a_row_for_what_would_have_fitted(lengths):
    rows = plan_rows(lengths, 30)
    free = [30 - sum(lengths[i] for i in row) for row in rows]
    for later, row in enumerate(
        rows
    ):  # the first of a row is its longest, and no earlier row had room for it in the end
        assert all(lengths[row[0]] > f for f in free[:later])


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(0, 20))
def test_a_window_hands_out_each_index_once_and_lets_none_wait_twice(lengths, old):
    aged = set(range(min(old, len(lengths))))
    rows, waiting = pack_window(lengths, 50, aged)
    assert sorted([i for row in rows for i in row] + waiting) == list(range(len(lengths)))
    assert not aged & set(waiting) and all(sum(lengths[i] for i in row) <= 50 for row in rows)
    again, rest = pack_window([lengths[i] for i in waiting], 50, set(range(len(waiting))))
    assert rest == [] and sum(map(len, again)) == len(waiting)


def test_pack_window_as_documented():
    assert pack_window([5, 4, 1, 2], 5, set()) == ([[0], [1, 2]], [3])


def test_the_reference_mixture_is_planned_in_seconds_and_nearly_full():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, 860_000), 10, 2049).astype(int).tolist()
    start = time.process_time()
    rows = plan_rows(lengths, 2049)
    assert time.process_time() - start < 5
    assert 1 - sum(lengths) / (len(rows) * 2049) < 0.001


def test_planning_and_collating_need_neither_datasets_nor_the_tokenizers_stack():
    modules = "nanochat_hf.packing, nanochat_hf.data.collate, nanochat_hf.data.planned, nanochat_hf.data.streamed"
    code = f"import sys; sys.modules['datasets'] = None\nimport {modules}\nprint('ok')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "ok", out.stderr
