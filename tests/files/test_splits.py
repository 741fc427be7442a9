"""Splits as datasets writes them mean the same rows as datasets takes, and start and rows count within them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_hf.files.splits import parse_split, within

ROWS = st.none() | st.integers(-30, 30).map(str)
SHARES = st.none() | st.integers(-100, 100).map("{}%".format)


@given(st.integers(0, 40), st.tuples(ROWS, ROWS) | st.tuples(SHARES, SHARES))
def test_a_slice_takes_the_rows_that_datasets_takes(count, bounds):
    from datasets import ReadInstruction

    first, stop = bounds
    text = f"train[{first or ''}:{stop or ''}]"
    try:
        [theirs] = ReadInstruction.from_spec(text).to_absolute({"train": count})
    except (ValueError, AssertionError):
        return  # datasets refuses some bounds that lie outside of the data; Python's slices cut them
    [part] = parse_split(text)
    rounded = [
        b for b in (first, stop) if b and b.startswith("-") and b.endswith("%") and not round(int(b[:-1]) * count / 100)
    ]
    if rounded:
        return  # datasets takes the last 0 rows for all rows; here train[:-1%] and train[-1%:] stay each other's rest
    assert (
        list(range(*part.range(count)))
        == list(range(count))[theirs.from_ or 0 : count if theirs.to is None else theirs.to]
    )


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=4), st.integers(0, 30), st.integers(1, 30))
def test_start_and_rows_count_within_the_ranges(pairs, start, rows):
    numbers = [n for first, stop in pairs for n in range(first, stop)]
    kept = [n for first, stop in within(pairs, start, rows) for n in range(first, stop)]
    assert kept == numbers[start : start + rows]


def test_an_open_range_stays_open():
    assert within([(10, 20), (50, None)], 5, 8) == [(15, 20), (50, 53)]
    assert within([(0, None)], 10, None) == [(10, None)]


@pytest.mark.parametrize("text", ["", "train[", "train[1.5:]", "a b", "train[10%", "train[200%:]"])
def test_what_is_no_split_is_said(text):
    with pytest.raises(ValueError, match=r"cannot be read; write train|lies outside of the data"):
        [part.range(10) for part in parse_split(text)]
