"""A run of chat_rl that was killed goes on to the same bits, its answers included, on one process and two."""

import shutil
import time

import pytest
import torch

from nanochat_hf.training.tracking import read_metrics
from tests.support.reinforcing import STEPS, reinforce, reinforce_here
from tests.support.training import weights

# several updates on the same answers, so that some checkpoints lie between them; a start to stay close to; refills
EVERYTHING = {
    "updates": 2,
    "clip": "token",
    "kl": 0.1,
    "refills": 2,
    "advantage": "deviation",
    "normalisation": "answers",
    "log_every": 2,
}
TIMES = ("seconds", "per_second", "step_time", "flops")


@pytest.fixture(scope="module")
def whole(rl_start, tmp_path_factory):
    """Uninterrupted runs on 1 and 2 processes."""
    root = tmp_path_factory.mktemp("whole_rl")
    pair = reinforce(rl_start, root / "2", root / "2.log", 2, **EVERYTHING)
    assert reinforce_here(rl_start, root / "1", **EVERYTHING) == 0
    assert pair.wait() == [0, 0], pair.text()
    return root


def measured(folder):
    """Every logged number that does not depend on the clock."""
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in TIMES)}
        for entry in read_metrics(folder / "metrics.jsonl")
    ]


def assert_same(folder, expected):
    ours, theirs = weights(folder), weights(expected)
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    assert measured(folder) == measured(expected)
    assert (folder / "samples.md").read_text() == (expected / "samples.md").read_text()


def copied(source, target, step):
    """A run's folder as it was when it was killed after `step`, perhaps amid what followed."""
    shutil.copytree(source, target)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(target / f"checkpoint-{later:06d}")
    shutil.rmtree(target / "final")
    return target


@pytest.mark.parametrize("step", range(1, STEPS))
def test_from_any_step(rl_start, whole, tmp_path, step):
    run = copied(whole / "1", tmp_path / "run", step)
    assert reinforce_here(rl_start, run, resume="auto", **EVERYTHING) == 0
    assert_same(run, whole / "1")


@pytest.mark.parametrize("step", [2, 3])
def test_from_a_step_on_two_processes(rl_start, whole, tmp_path, step):
    run = copied(whole / "2", tmp_path / "run", step)
    again = reinforce(rl_start, run, tmp_path / "log", 2, resume="auto", **EVERYTHING)
    assert again.wait() == [0, 0], again.text()
    assert_same(run, whole / "2")


@pytest.mark.parametrize("world", [1, 2])
def test_after_kill_minus_nine(rl_start, whole, tmp_path, world):
    first = reinforce(rl_start, tmp_path / "run", tmp_path / "log", world, **EVERYTHING)
    limit = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoint-000003").is_dir() and time.monotonic() < limit:
        time.sleep(0.02)
    first.kill()
    first.wait()
    assert not (tmp_path / "run" / "final").exists(), "it was too fast to be killed"
    again = reinforce(rl_start, tmp_path / "run", tmp_path / "log2", world, resume="auto", **EVERYTHING)
    assert again.wait() == [0] * world, again.text()
    assert_same(tmp_path / "run", whole / str(world))


def test_one_process_and_two_write_the_same_answers_and_learn_the_same(whole):
    one, two = measured(whole / "1"), measured(whole / "2")
    for name in ("reward", "completions/mean_length", "rollout/questions", "frac_reward_zero_std"):
        assert one[0][name] == pytest.approx(two[0][name]), name
    ours, theirs = weights(whole / "1"), weights(whole / "2")
    for name, value in ours.items():
        assert (theirs[name] - value).norm() <= 1e-2 * value.norm() + 1e-3, name


def test_another_number_of_processes_goes_on_from_between_two_batches_only(rl_start, whole, tmp_path, capsys):
    run = copied(whole / "1", tmp_path / "run", 3)  # amid two updates
    pair = reinforce(rl_start, run, tmp_path / "log", 2, resume="auto", **EVERYTHING)
    assert pair.wait() == [2, 2] and "between two updates on the same answers" in pair.text(), pair.text()
    run = copied(whole / "2", tmp_path / "other", 4)
    assert reinforce_here(rl_start, run, resume="auto", **EVERYTHING) == 0
    assert f"at step 4 of {STEPS}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "reason"), [({"seed": 5}, "drawn by seed 0"), ({"tasks": "calculator"}, "questions, this run's")]
)
def test_other_questions_are_refused(rl_start, whole, tmp_path, capsys, changed, reason):
    run = copied(whole / "1", tmp_path / "run", 2)
    assert reinforce_here(rl_start, run, resume="auto", **EVERYTHING, **changed) == 2
    assert reason in capsys.readouterr().err
