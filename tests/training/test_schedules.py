"""Schedules: the numbers of their docstrings, their ends, and what they refuse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_hf.training.schedules import base_lr, muon_momentum, sft_lr, weight_decay


def test_docstring_numbers():
    assert [base_lr(0.25), base_lr(0.75), base_lr(1.0)] == [1.0, 0.5, 0.0]
    assert sft_lr(0.9) == pytest.approx(0.5)
    assert muon_momentum(150) == pytest.approx(0.9)
    assert weight_decay(0.25) == 0.75


def test_warmup_and_final_share():
    assert base_lr(0.05, warmup=0.1) == pytest.approx(0.5)
    assert base_lr(1.0, final=0.1) == pytest.approx(0.1)
    assert base_lr(1.0, warmdown=0.0) == 1.0


def test_sft_is_flat_then_falls_to_zero():
    assert sft_lr(0.0) == sft_lr(0.8) == 1.0
    assert sft_lr(1.0) == 0.0
    assert sft_lr(1.0, flat=1.0) == 1.0


def test_momentum_ends():
    assert muon_momentum(0) == 0.85
    assert muon_momentum(300) == muon_momentum(10**6) == pytest.approx(0.95)
    assert muon_momentum(0, warmup_steps=0) == pytest.approx(0.95)


@given(st.floats(0, 1), st.floats(0, 1))
def test_learning_rates_never_rise_without_warmup(first, second):
    early, late = sorted((first, second))
    for schedule in (base_lr, sft_lr, weight_decay):
        assert 0 <= schedule(late) <= schedule(early) <= 1


def test_progress_is_clamped():
    assert base_lr(1.5) == 0.0 and base_lr(-1) == 1.0 and weight_decay(2) == 0.0


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: base_lr(0.5, warmup=0.7, warmdown=0.5), "warmup=0.7"),
        (lambda: sft_lr(0.5, flat=1.5), "flat=1.5"),
        (lambda: base_lr(float("nan")), "progress=nan"),
    ],
)
def test_refusals_name_the_value(call, text):
    with pytest.raises(ValueError, match=text):
        call()
