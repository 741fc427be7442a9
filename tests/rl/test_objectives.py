"""Advantages and normalisations against loops that are written from the formulas."""

import numpy as np
import pytest

from nanochat_hf.rl.objectives import (
    ADVANTAGES,
    NORMALISATIONS,
    advantages,
    is_mixed,
    overlong_penalty,
    token_factors,
)

GROUPS = ([1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.5, -2.0, 3.0, 0.25])


def written_out(kind, rewards):
    found = []
    for i, r in enumerate(rewards):
        average = sum(rewards) / len(rewards)
        others = [x for j, x in enumerate(rewards) if j != i]
        spread = (sum((x - average) ** 2 for x in rewards) / (len(rewards) - 1)) ** 0.5
        found.append(
            {
                "mean": r - average,
                "deviation": (r - average) / (spread + 1e-4),
                "leave_one_out": r - sum(others) / len(others),
            }[kind]
        )
    return found


@pytest.mark.parametrize("rewards", GROUPS, ids=str)
@pytest.mark.parametrize("kind", ADVANTAGES)
def test_advantages_are_those_of_the_formula(kind, rewards):
    assert advantages(np.array(rewards), kind).tolist() == pytest.approx(written_out(kind, rewards), rel=1e-12)


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_unknown_rewards_have_no_part(kind):
    found = advantages(np.array([1.0, np.nan, 0.0, 0.0]), kind)
    assert found[1] == 0 and np.delete(found, 1).tolist() == pytest.approx(written_out(kind, [1.0, 0.0, 0.0]))


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize("rewards", [[0.0, 0.0], [1.0, 1.0, 1.0], [np.nan, 1.0], [np.nan, np.nan]], ids=str)
def test_equal_rewards_teach_nothing(kind, rewards):
    assert not is_mixed(np.array(rewards)) and not advantages(np.array(rewards), kind).any()


def test_one_loser_makes_a_group_mixed():
    assert is_mixed(np.array([1.0, 1.0, 1.0, 0.0]))


@pytest.mark.parametrize("kind", NORMALISATIONS)
def test_a_sum_over_tokens_times_their_factors_is_the_papers_sum(kind):
    lengths, losses = [2, 1, 3, 1, 2, 2], [0.3, -1.0, 2.0, 0.5, -0.25, 0.75]  # every token of an answer loses the same
    total, answers, longest = sum(lengths), len(lengths), 4
    expected = 0.0
    for n, loss in zip(lengths, losses, strict=True):
        for _ in range(n):
            expected += (
                loss * {"tokens": 1 / total, "answers": 1 / (answers * n), "constant": 1 / (answers * longest)}[kind]
            )
    factors = token_factors(lengths, kind, longest)
    ours = sum(f * loss * n for f, loss, n in zip(factors, losses, lengths, strict=True)) / total
    assert ours == pytest.approx(expected)
    assert len(token_factors([], kind, longest)) == 0


def test_overlong_answers():
    assert [overlong_penalty(n, 256, 64) for n in (10, 192, 224, 256, 300)] == [0, 0, -0.5, -1, -1]
    assert overlong_penalty(256, 256, 0) == 0
