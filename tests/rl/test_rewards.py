"""Rewards: names, weights, errors, limits of time, and their order."""

import math
import threading
import time

import pytest

from nanochat_hf.rl.rewards import Grader, Job, NamedReward, parse_rewards


def jobs(*texts):
    return [Job({"answer": "yes"}, text, lambda conversation, text: text == conversation["answer"]) for text in texts]


def test_a_grade_and_a_function_with_a_weight_add_up():
    rewards = [NamedReward("grade"), NamedReward("length", lambda conversation, text: len(text), -0.5)]
    graded = Grader(rewards)(jobs("yes", "no"))
    assert [g.total for g in graded] == [1 - 1.5, -1.0]
    assert graded[0].parts == {"grade": 1.0, "length": 3.0}


def test_an_exception_is_its_answers_own_error():
    def picky(conversation, text):
        if text == "b":
            raise KeyError("lost")
        return 1

    a, b, c = Grader([NamedReward("picky", picky), NamedReward("grade")])(jobs("a", "b", "c"))
    assert a.total == c.total == 1.0 and math.isnan(b.total) and math.isnan(b.parts["picky"]) and b.parts["grade"] == 0
    assert b.errors == ("picky: KeyError: 'lost'",)


def test_slow_rewards_run_side_by_side_and_do_not_change_the_order():
    together = threading.Barrier(4, timeout=20)  # none returns before all four have begun

    def slow(conversation, text):
        together.wait()
        time.sleep(0.03 * (4 - int(text)))
        return int(text)

    grader = Grader([NamedReward("slow", slow)], threads=4)
    assert [g.total for g in grader(jobs("0", "1", "2", "3"))] == [0, 1, 2, 3]


def test_a_reward_beyond_its_time_is_given_up_and_the_others_go_on():
    stuck = threading.Event()

    def maybe(conversation, text):
        if text == "stuck":
            stuck.wait(60)
        return 2.0

    grader = Grader([NamedReward("maybe", maybe)], seconds=0.2, threads=1)
    before, lost, after = grader(jobs("a", "stuck", "b"))
    assert (before.total, after.total) == (2.0, 2.0) and lost.errors == ("maybe: took longer than 0.2 s",)
    stuck.set()
    assert [g.total for g in grader(jobs("c", "d"))] == [2.0, 2.0]  # nothing of the lost call turns up later
    grader.close()


@pytest.mark.parametrize("returned", [None, "0.5", math.nan, math.inf, [1]], ids=str)
def test_a_reward_that_is_no_number_is_named(returned):
    with pytest.raises(ValueError, match=r"--reward odd: returned .* return a finite number"):
        Grader([NamedReward("odd", lambda conversation, text: returned)])(jobs("a"))


def test_names_weights_and_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "own_rewards_here.py").write_text("def short(conversation, text):\n    return -len(text)\n")
    monkeypatch.chdir(tmp_path)
    grade, short = parse_rewards("grade, own_rewards_here:short=0.25")
    assert (grade.name, grade.weight, grade.function) == ("grade", 1.0, None)
    assert (short.name, short.weight, short.function({}, "abc")) == ("short", 0.25, -3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nothing", "must be grade or package.module:function"),
        ("no_such_module_here:f", "cannot be imported"),
        ("math:no_such", "cannot be imported"),
        ("math:pi", "is float, no function"),
        ("grade=much", "the weight 'much' is no number"),
        ("grade,grade", "grade stands there twice"),
    ],
)
def test_what_cannot_be_a_reward_is_one_line(text, reason):
    with pytest.raises(ValueError, match=reason) as error:
        parse_rewards(text)
    assert ("\n" not in str(error.value) and ";" in str(error.value)) or "such as" in str(error.value)
