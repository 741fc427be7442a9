"""Schedules: the numbers of their docstrings, their ends, what they give to an optimizer, and what they refuse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_hf.cli.plot_schedules import curves
from nanochat_hf.training.pretraining import BaseSchedule
from nanochat_hf.training.schedules import Schedule, ScheduleConfig, falling, lr_multiplier, muon_momentum


class Groups:
    """An optimizer as a schedule sees it."""

    def __init__(self):
        self.param_groups = [
            {"kind": "muon", "initial_lr": 2.0, "initial_weight_decay": 4.0},
            {"kind": "adamw", "initial_lr": 3.0, "initial_weight_decay": 0.0},
        ]


def test_docstring_numbers():
    assert [lr_multiplier(step, 4, warmup_steps=1, warmdown_ratio=0.5) for step in range(4)] == [0.5, 1.0, 0.75, 0.25]
    assert muon_momentum(150) == pytest.approx(0.9)
    assert falling(1, 4) == 0.75


def test_a_step_sets_rates_momentum_and_weight_decay():
    base, sft = Groups(), Groups()
    assert Schedule(4, BaseSchedule())(base, 3) == 0.25
    assert [group["lr"] for group in base.param_groups] == [0.5, 0.75]
    assert base.param_groups[0]["weight_decay"] == 1.0 and "weight_decay" not in base.param_groups[1]
    assert base.param_groups[0]["momentum"] == pytest.approx(0.85 + 0.1 * 3 / 300)
    assert Schedule(4, ScheduleConfig())(sft, 2) == 1.0
    assert sft.param_groups[0]["weight_decay"] == 4.0


def test_residual_scalars_may_stand_still_and_rise_alone():
    optimizer = Groups()
    optimizer.param_groups += [
        {"kind": "adamw", "name": name, "initial_lr": 1.0, "initial_weight_decay": 0.0} for name in ("x0_lambdas", "x")
    ]
    schedule = Schedule(100, ScheduleConfig(scalar_hold_steps=2, scalar_warmup_steps=4))
    rates = []
    for step in range(8):
        schedule(optimizer, step)
        rates.append([group["lr"] for group in optimizer.param_groups[2:]])
    assert rates == [[0.0, 1], [0.0, 1], [0.25, 1], [0.5, 1], [0.75, 1], [1, 1], [1, 1], [1, 1]]


def test_rates_fall_to_their_share_and_momentum_with_them():
    schedule = Schedule(1000, ScheduleConfig(warmdown_ratio=0.5, final_lr_frac=0.1, momentum=0.97, momentum_final=0.9))
    assert schedule.lr(999) == pytest.approx(0.1, abs=1e-3) and schedule.lr(499) == 1.0
    assert [schedule.momentum(step) for step in (300, 499, 750)] == pytest.approx([0.97, 0.97, 0.935])


def test_without_a_warm_down_the_rate_stays():
    assert {lr_multiplier(step, 10, warmdown_ratio=0.0) for step in range(10)} == {1.0}


def test_momentum_ends():
    assert muon_momentum(0) == 0.85
    assert muon_momentum(300) == muon_momentum(10**6) == pytest.approx(0.95)
    assert muon_momentum(0, warmup_steps=0) == pytest.approx(0.95)


@given(st.integers(1, 1000), st.floats(0, 1))
def test_rates_and_decay_never_rise_without_warmup_and_no_step_is_lost(num_steps, warmdown):
    rates = [lr_multiplier(step, num_steps, warmdown_ratio=warmdown) for step in range(num_steps)]
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] <= rates[0] <= 1
    decay = [falling(step, num_steps) for step in range(num_steps)]
    assert decay == sorted(decay, reverse=True) and 0 < decay[-1] <= decay[0] == 1


def test_the_plot_draws_what_trains():
    drawn = curves(40, points=40)
    base, sft = Schedule(40, BaseSchedule()), Schedule(40, ScheduleConfig())
    for name, schedule in (("base", base), ("SFT", sft)):
        optimizer = Groups()
        trained = [(step / 40, schedule(optimizer, step)) for step in range(40)]
        assert drawn[f"{name} learning rate"] == trained
    optimizer, decay = Groups(), []
    for step in range(40):
        base(optimizer, step)
        decay.append((step / 40, optimizer.param_groups[0]["weight_decay"] / 4.0))
    assert drawn["base weight decay"] == decay


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: Schedule(8, ScheduleConfig(warmup_steps=4, warmdown_ratio=1.0)), "overlap in a run of 8 steps"),
        (lambda: ScheduleConfig(warmdown_ratio=1.5), "--warmdown-ratio 1.5 must lie between 0 and 1; "),
        (lambda: ScheduleConfig(final_lr_frac=2), "--final-lr-frac 2 must lie between 0 and 1"),
        (lambda: ScheduleConfig(decay_shape="step"), "--decay-shape step is unknown; choose from constant, linear"),
        (lambda: ScheduleConfig(momentum=1.0), "--momentum 1.0 must lie from 0 to below 1"),
        (lambda: ScheduleConfig(warmup_steps=-1), "--warmup-steps -1 must be at least 0"),
    ],
)
def test_refusals_name_the_value(call, text):
    with pytest.raises(ValueError, match=text):
        call()
