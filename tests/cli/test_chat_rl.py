"""scripts.chat_rl as users start it: plan, smoke test, what is refused, what is logged and left behind."""

import json

import pytest

from nanochat_hf.model import NanochatForCausalLM
from nanochat_hf.training.tracking import read_metrics
from tests.support.reinforcing import STEPS, reinforce, reinforce_here, rl_start  # noqa: F401
from tests.support.training import weights

# TRL's names, as far as they have a meaning here
NAMES = {
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "rewards/small/mean",
    "rewards/small/std",
    "rewards/errors",
    "rewards/forged",
    "rollout/tokens_per_second",
    "update/tokens_per_second",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "completions/mean_terminated_length",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "entropy",
    "kl",
    "num_tokens",
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
    "step_time",
    "tools/call_frequency",
}


def test_plan_only_and_smoke_test_write_nothing(rl_start, tmp_path, capsys):  # noqa: F811
    assert reinforce_here(rl_start, tmp_path / "plan", plan_only=True) == 0
    said = capsys.readouterr().out
    assert "3 questions × 4 of up to 12 tokens" in said and "advantage mean" in said and "step 1/" not in said
    assert reinforce_here(rl_start, tmp_path / "smoke", smoke_test=True, num_steps=None, task_every=60) == 0
    said = capsys.readouterr().out
    assert "step 5/5" in said and "2 questions × 2 of up to 12 tokens" in said
    assert not (tmp_path / "plan").exists() and not (tmp_path / "smoke").exists()


def test_what_a_run_logs_and_leaves_behind(rl_start, tmp_path):  # noqa: F811
    changed = {"tasks": "calculator", "task_every": 4, "task_limit": 2, "task_samples": 2, "task_tokens": 4}
    assert reinforce_here(rl_start, tmp_path / "run", config=None, save_every=0, **changed) == 0
    entries = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [entry for entry in entries if "train/loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, STEPS + 1))
    assert {name for entry in steps for name in entry} >= NAMES
    measured = {entry["step"] for entry in entries if "eval/calculator/pass@1" in entry}
    assert measured == {0, 4, 6} and "eval/calculator/pass@2" in entries[0]
    apart = [entry.get("sampling/sampling_logp_difference/max", 0.0) for entry in steps]  # none without a mixed group
    assert max(apart) < 1e-4
    NanochatForCausalLM.from_pretrained(tmp_path / "run" / "final")
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| reward at first |" in report and "| step | question | answer | reward | finished |" in report
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["stage"], config["num_samples"], config["advantage"]) == ("rl", 4, "mean")
    assert config["train_data"][0]["task"] == "calculator" and config["init_lr_frac"] == 0.1


def test_steps_follow_from_the_questions(rl_start, tmp_path, capsys):  # noqa: F811
    changed = {"num_steps": None, "updates": 2, "clip": "cispo", "epochs": 0.5}
    assert reinforce_here(rl_start, tmp_path / "run", plan_only=True, **changed) == 0
    assert "in 32 steps" in capsys.readouterr().out  # 50 questions, 3 a batch: 16 batches of two updates


def test_learning_rates_are_a_twentieth_and_fall(rl_start, tmp_path):  # noqa: F811
    changed = {"init_lr_frac": None, "num_steps": 4, "save_every": 0}
    assert reinforce_here(rl_start, tmp_path / "run", **changed) == 0
    steps = [entry for entry in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in entry]
    assert [entry["train/lr_multiplier"] for entry in steps] == pytest.approx([0.875, 0.625, 0.375, 0.125])
    (rate,) = {value for name, value in steps[0].items() if name.startswith("lr/matrix")}
    assert rate == pytest.approx(0.02 * 0.05 * 0.875)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"num_samples": 1}, "--num-samples 1: an answer is compared with others"),
        ({"temperature": 0}, "--temperature 0.0: greedy answers are all the same"),
        ({"total_batch_size": 4096}, "a step takes the answers to --questions"),
        ({"max_new_tokens": 64}, "does not fit rows of --max-seq-len 64"),
        ({"max_new_tokens": 60}, "no question has a prompt of at most 4 tokens"),
        ({"updates": 2}, "--updates 2 with --clip none would train on old answers"),
        ({"clip": "hard"}, "--clip hard is unknown; choose from none, token, cispo, sequence"),
        ({"advantage": "best"}, "--advantage best is unknown"),
        ({"normalisation": "none"}, "--normalisation none is unknown"),
        ({"reward": "grade"}, "conversations of no task have no grade"),
        ({"reward": "nowhere_at_all:f"}, "--reward nowhere_at_all:f: cannot be imported"),
        ({"config": None}, "no questions; give --tasks"),
        ({"config": None, "tasks": "gsm9k"}, "task 'gsm9k' (did you mean 'gsm8k'?) is unknown"),
    ],
    ids=str,
)
def test_flags_that_cannot_be_are_one_line(rl_start, tmp_path, capsys, changed, reason):  # noqa: F811
    assert reinforce_here(rl_start, tmp_path / "run", **changed) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert reason in said, said
    assert not (tmp_path / "run").exists()


def test_a_reward_without_a_number_ends_both_processes_with_one_line(rl_start, tmp_path):  # noqa: F811
    run = reinforce(rl_start, tmp_path / "run", tmp_path / "log", 2, reward="builtins:print")
    assert run.wait() == [2, 2], run.text()
    assert run.text().count("--reward print: returned 'None'") == 1 and "Traceback" not in run.text(), run.text()


def test_a_run_in_which_nothing_is_learned_changes_no_weight(rl_start, tmp_path):  # noqa: F811
    """All rewards equal: neither momentum nor weight decay moves a weight."""
    changed = {"reward": "operator:is_not", "num_steps": 3, "save_every": 0, "weight_decay": 0.1}
    assert reinforce_here(rl_start, tmp_path / "same", **changed) == 0  # a conversation is not a text: always 1
    start, after = weights(rl_start / "sft"), weights(tmp_path / "same")
    assert all((value == after[name]).all() for name, value in start.items())
    steps = [entry for entry in read_metrics(tmp_path / "same" / "metrics.jsonl") if "train/loss" in entry]
    assert [entry["train/skipped_steps"] for entry in steps] == [1, 2, 3]
