"""Rollouts with answers that are written by the test: order, seeds, weights, refills, masks, errors."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from nanochat_hf.model.policy_nanochat_hf import Policy
from nanochat_hf.rl.answers import Answer, Sampling
from nanochat_hf.rl.objectives import advantages
from nanochat_hf.rl.questions import Question, Questions
from nanochat_hf.rl.rewards import Grader, NamedReward
from nanochat_hf.rl.rollouts import Models, Objective, RolloutBatches, Setup
from nanochat_hf.rl.rows import Shape
from nanochat_hf.tasks.base import pair

COUNT = 5


def questions(count=COUNT, seed=0):
    return Questions(
        [Question("test", pair(f"question {i}", "x"), (1, 100 + i), lambda c, text: float(text)) for i in range(count)],
        seed,
    )


class Script:
    """Writes, for question i, the texts that `texts(i)` says, and keeps what it was asked."""

    def __init__(self, texts, **fields):
        self.texts, self.fields, self.asked = texts, fields, []

    def refresh(self):
        self.asked.append("refresh")

    def __call__(self, asked, seeds):
        found = []
        for question, seed in zip(asked, seeds, strict=True):
            index = question.prompt[1] - 100
            self.asked.append((index, seed))
            found.append([self.answer(text, number) for number, text in enumerate(self.texts(index))])
        return found

    def answer(self, text, number):
        ids = tuple(range(7, 9 + number))  # answers of different lengths
        fields = {"finished": True, "trained": (True,) * len(ids), "log_probs": (-1.0,) * len(ids)} | self.fields
        return Answer(ids=ids, text=text, **fields)


def batches(texts, seed=0, writer=None, count=COUNT, **objective):
    setup = Setup(Objective(**({"questions": 2} | objective)), Sampling(2, max_new_tokens=8), Shape(4, 32, 1), pad=0)
    script = writer or Script(texts)
    made = RolloutBatches(
        questions(count, seed), Models(None, script), Grader([NamedReward("grade")]), Accelerator(cpu=True), setup
    )
    return made, script


def mixed(index):
    return ["1", "0"]


def trained(batch):
    keep = batch["shift_labels"] != -100
    return batch["loss_weights"][keep].tolist()


def test_every_visit_asks_each_question_once_in_another_order_with_other_seeds():
    made, script = batches(mixed)
    iterator = iter(made)
    for _ in range(5):
        next(iterator)
    asked = [entry for entry in script.asked if entry != "refresh"]
    visits = asked[:COUNT], asked[COUNT:]
    assert [sorted(index for index, _ in visit) for visit in visits] == [list(range(COUNT))] * 2
    assert [index for index, _ in visits[0]] != [index for index, _ in visits[1]]
    assert len({seed for _, seed in asked}) == 2 * COUNT
    assert script.asked.count("refresh") == 5 and script.asked[0] == "refresh"
    assert made.epoch == 2.0


def test_seeds_and_order_follow_from_the_seed_and_the_number_of_the_question_alone():
    first, whole = batches(mixed)
    list(zip(range(4), first, strict=False))
    for start in range(1, 4):
        later, script = batches(mixed)
        state = first.state_dict() | {"next_question": 2 * start, "held": None}
        later.load_state_dict(state)
        next(iter(later))
        plain = [entry for entry in whole.asked if entry != "refresh"]
        assert script.asked[1:] == plain[2 * start : 2 * start + 2]
    other, script = batches(mixed, seed=1)
    next(iter(other))
    assert script.asked[1:] != plain[:2]


@pytest.mark.parametrize("kind", ["mean", "deviation", "leave_one_out"])
def test_weights_are_advantages_times_what_the_normalisation_makes(kind):
    made, _ = batches(mixed, advantage=kind, normalisation="answers")
    batch = next(iter(made))
    total = int((batch["shift_labels"] != -100).sum())
    a = advantages(np.array([1.0, 0.0]), kind)
    # answers of 2 and 3 tokens, two of each: N ÷ (M·n) with N = 10, M = 4
    expected = sorted([a[0] * 10 / 8] * 4 + [a[1] * 10 / 12] * 6)
    assert total == 10 and sorted(trained(batch)) == pytest.approx(expected)
    assert batch["sampler_log_probs"][batch["shift_labels"] != -100].tolist() == [-1.0] * 10


def test_without_refills_equal_groups_count_as_tokens_and_teach_nothing():
    made, _ = batches(lambda index: ["1", "0"] if index % 2 else ["1", "1"])
    for _, batch in zip(range(3), made, strict=False):
        assert len(trained(batch)) in (0, 10)  # none at all where no group is mixed


def test_a_step_without_a_mixed_group_has_no_target():
    made, _ = batches(lambda index: ["1", "1"])
    assert trained(next(iter(made))) == []


def test_refills_replace_equal_groups_within_their_bound():
    good = {0, 3}
    made, _ = batches(lambda index: ["1", "0"] if index in good else ["0", "0"], refills=3)
    drawn = made.draw()
    assert [group.index in good for group in drawn.kept] == [True] * len(drawn.kept)
    assert len(drawn.kept) == 2 and 0 <= drawn.refills <= 3 and len(drawn.groups) == made.next_question
    bounded, _ = batches(lambda index: ["0", "0"], refills=3, count=50)
    drawn = bounded.draw()
    assert drawn.kept == [] and drawn.refills == 3 and len(drawn.groups) == 2 + 3 * 2
    partly, _ = batches(lambda index: ["1", "0"] if index == 0 else ["0", "0"], refills=1, count=50)
    while not (drawn := partly.draw()).kept:
        pass
    assert [group.index for group in drawn.kept] == [0]  # fewer than wanted, and no equal group beside it


def test_several_updates_take_the_same_answers():
    class Model(torch.nn.Module):
        def forward(self, **batch):
            from types import SimpleNamespace

            assert self.training and "factors" not in batch
            return SimpleNamespace(log_probs=-2.0 * torch.ones(batch["input_ids"].shape))

    setup = Setup(
        Objective(2, updates=3, kl=0.5, policy=Policy("token"), normalisation="answers"),
        Sampling(2, max_new_tokens=8),
        Shape(4, 32, 1),
        pad=0,
    )
    script, model = Script(mixed), Model().eval()
    grader = Grader([NamedReward("grade")])
    made = RolloutBatches(questions(), Models(model, script, start=model), grader, Accelerator(cpu=True), setup)
    found = [batch for _, batch in zip(range(4), made, strict=False)]
    assert found[0] is found[1] is found[2] and found[3] is not found[0] and script.asked.count("refresh") == 2
    assert (found[0]["old_log_probs"] == -2).all() and (found[0]["start_log_probs"] == -2).all()
    assert not model.training  # as it was
    keep = found[0]["shift_labels"] != -100
    factors = sorted([10 / 8] * 4 + [10 / 12] * 6)
    assert sorted(found[0]["kl_weights"][keep].tolist()) == pytest.approx([0.5 * f for f in factors])


@pytest.mark.parametrize(
    ("fields", "reward"),
    [({"finished": False}, 0.0), ({"forged": True}, 0.0), ({}, 1.0)],
    ids=["did not end", "wrote the tool's output itself", "plain"],
)
def test_what_did_not_end_or_was_forged_earns_nothing_above_zero(fields, reward):
    made, _ = batches(None, writer=Script(lambda index: ["1", "-1"], **fields))
    for group in made.draw().groups:
        assert group.rewards.tolist() == [reward, -1.0]


def test_masked_truncated_answers_are_no_targets_but_count_in_the_mean():
    script = Script(mixed)
    plain = script.answer
    script.answer = lambda text, number: plain(text, number) if number else Answer((7, 8), (True, True), text, False)
    made, _ = batches(None, writer=script, mask_truncated=True)
    script.texts = lambda index: ["-1", "0"]
    batch = next(iter(made))
    assert trained(batch) == [0.5] * 6  # the second answers alone: their advantage is 0 − (−0.5)


def test_an_answer_whose_reward_failed_is_left_out():
    made, _ = batches(lambda index: ["1", "0", "oops"])
    drawn = made.draw()
    assert all(math.isnan(group.rewards[2]) and group.answers[2].graded.errors for group in drawn.groups)
    rows = made.rows(drawn.kept)
    assert len(rows) == 4 and sorted({row.weight for row in rows}) == [-0.5, 0.5]


def test_errors_are_raised_as_they_are():
    setup = Setup(Objective(2), Sampling(2, max_new_tokens=8), Shape(4, 32, 1), pad=0)
    grader = Grader([NamedReward("none", lambda conversation, text: None)])
    made = RolloutBatches(questions(), Models(None, Script(mixed)), grader, Accelerator(cpu=True), setup)
    with pytest.raises(ValueError, match="--reward none: returned 'None'"):
        made.draw()
