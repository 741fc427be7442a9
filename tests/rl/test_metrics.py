"""What is logged: numbers of answers and of tokens, and signs that nothing is learned."""

import math
from types import SimpleNamespace

import pytest
import torch

from nanochat_hf.model.policy_nanochat_hf import Policy
from nanochat_hf.rl.answers import Answer, Group
from nanochat_hf.rl.metrics import RolloutMetrics, rollout_metrics
from nanochat_hf.rl.rewards import Graded
from nanochat_hf.rl.watch import ALL_EQUAL, Watch


def answer(reward, length=3, finished=True, **fields):
    errors = ("grade: lost",) if math.isnan(reward) else ()
    graded = Graded(reward, {"grade": reward}, errors)
    return Answer(tuple(range(length)), (True,) * length, "", finished, graded=graded, reward=reward, **fields)


def groups(*rewards, **fields):
    return [Group(i, i, tuple(answer(r, **fields) for r in row)) for i, row in enumerate(rewards)]


def test_numbers_of_answers():
    drawn = [
        Group(0, 0, (answer(1.0, 4), answer(0.0, 8, finished=False), answer(math.nan, 2))),
        Group(1, 1, (answer(0.5, 6), answer(0.5, 6, forged=True), answer(0.5, 1))),
    ]
    found = rollout_metrics(drawn, ["grade"])
    assert found["reward"] == pytest.approx(0.5) and found["reward_std"] == pytest.approx(0.125**0.5)
    assert found["rewards/grade/mean"] == found["reward"] and found["frac_reward_zero_std"] == 0.5
    assert [found[f"completions/{k}_length"] for k in ("mean", "min", "max")] == [4.5, 1, 8]
    assert found["completions/mean_terminated_length"] == pytest.approx(19 / 5)
    assert found["completions/clipped_ratio"] == pytest.approx(1 / 6)
    assert (found["rewards/errors"], found["rewards/forged"], found["tools/call_frequency"]) == (1, 1, 0)


def batch_and_output(seed=0):
    draw = torch.Generator().manual_seed(seed)
    shape = (2, 6)
    batch = {
        "shift_labels": torch.randint(5, shape, generator=draw),
        "loss_weights": torch.randn(shape, generator=draw),
        "answer_ids": torch.zeros(shape, dtype=torch.long),
    }
    names = ("old_log_probs", "start_log_probs", "sampler_log_probs")
    batch |= {name: -1 + 0.5 * torch.randn(shape, generator=draw) for name in names}
    batch["shift_labels"][0, :2] = -100
    log_probs = -1 + 0.5 * torch.randn(shape, generator=draw)
    return batch, SimpleNamespace(log_probs=log_probs, entropies=torch.rand(shape, generator=draw))


@pytest.mark.parametrize(
    "policy", [Policy(), Policy("token", 0.2, 0.3), Policy("cispo", high=0.1)], ids=lambda p: p.clip
)
def test_numbers_of_tokens_are_means_over_all_trained_ones(policy):
    metrics, sums, count = RolloutMetrics(policy), {}, 0
    for seed in (0, 1):
        batch, output = batch_and_output(seed)
        metrics.observe(batch, output)
        for place in (batch["shift_labels"] != -100).nonzero().tolist():
            place, count = tuple(place), count + 1
            log, a = output.log_probs[place], batch["loss_weights"][place]
            ratio, d = (log - batch["old_log_probs"][place]).exp(), batch["start_log_probs"][place] - log
            wanted = {"entropy": output.entropies[place], "kl": d.exp() - d - 1}
            if policy.clip == "cispo":
                wanted["cispo_clip_ratio"] = ratio > 1 + policy.high
            else:
                low = policy.clip == "token" and a < 0 and ratio < 1 - policy.low
                high = policy.clip == "token" and a > 0 and ratio > 1 + policy.high
                wanted |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high}
                wanted["clip_ratio/region_mean"] = low or high
            wanted["sampling/sampling_logp_difference/mean"] = (log - batch["sampler_log_probs"][place]).abs()
            sums = {name: sums.get(name, 0.0) + float(value) for name, value in wanted.items()}
    found = metrics.values(lambda tensor: tensor)
    assert {name: found[name] for name in sums} == pytest.approx({name: s / count for name, s in sums.items()})
    assert found["sampling/sampling_logp_difference/max"] >= found["sampling/sampling_logp_difference/mean"]
    assert metrics.values(lambda tensor: tensor) == {"num_tokens": 0}  # it begins anew


def test_averages_go_on_after_a_resume():
    whole, half, later = (RolloutMetrics(Policy()) for _ in range(3))
    for number in range(4):
        batch, output = batch_and_output(number)
        for metrics in (whole, half if number < 2 else later):
            if number == 2 and metrics is later:
                later.load_state_dict(half.state_dict(), torch.device("cpu"))
            metrics.add({"reward": number / 3})
            metrics.observe(batch, output)
    assert later.values(lambda t: t) == whole.values(lambda t: t)


def test_answers_that_never_end_are_named_after_three_steps():
    watch = Watch()
    for step in range(5):
        watch.look(groups([0.0, 1.0], finished=step == 2), 8)
    with pytest.raises(ValueError, match=r"no answer of 3 steps ended within 8 tokens.*chat_sft"):
        watch.look(groups([0.0, 1.0], finished=False), 8)


def test_equal_rewards_are_named_after_twenty_steps():
    watch = Watch()
    for _ in range(ALL_EQUAL - 1):
        watch.look(groups([1.0, 1.0], [0.0, 0.0]), 8)
    watch.look(groups([1.0, 0.0]), 8)
    watch = Watch(**watch.state_dict())
    for _ in range(ALL_EQUAL - 1):
        watch.look(groups([1.0, 1.0], [0.0, 0.0]), 8)
    with pytest.raises(ValueError, match=r"in 20 steps no question .* last mean was 0.5.*--num-samples"):
        watch.look(groups([1.0, 1.0], [0.0, 0.0]), 8)


def test_rewards_that_always_fail_are_named():
    watch = Watch()
    for _ in range(2):
        watch.look(groups([math.nan, math.nan]), 8)
    with pytest.raises(ValueError, match=r"every reward of 3 steps failed, the last with grade: lost; correct"):
        watch.look(groups([math.nan, math.nan]), 8)


def test_an_entropy_near_zero_is_said_once():
    watch = Watch()
    assert watch.warning(0.5) is None and watch.warning(None) is None
    assert "--temperature" in (watch.warning(1e-5) or "") and watch.warning(1e-5) is None
