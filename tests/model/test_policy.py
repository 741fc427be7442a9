"""The loss of reinforcement learning: its value and gradient are autograd's of the loss as the papers write it."""

import pytest
import torch
from torch import nn

from nanochat_hf.model.ops_nanochat_hf import nll_and_slope
from nanochat_hf.model.policy_nanochat_hf import Policy, PolicyTokens, clipped_tokens, log_ratios, policy_terms
from tests.support.models import build, tokens

# The example of two questions with three answers each: log-ratios of the tokens, and rewards 1 0 0 | 1 1 0.
RATIOS = [[0.3, -0.1], [0.4], [-0.3, 0.1, 0.0], [0.2], [-0.2, 0.1], [0.1, -0.4]]
MEAN = [2 / 3, -1 / 3, -1 / 3, 1 / 3, 1 / 3, -2 / 3]
DEVIATION = [1.154701, -0.577350, -0.577350, 0.577350, 0.577350, -1.154701]
OLD, START = -1.0, -1.2
N, M, LONGEST = 11, 6, 4
# (advantages, divisor, policy, loss, weight × divisor of each token)
EXAMPLES = {
    "GRPO": (
        DEVIATION, "answers", Policy("token", 0.2, 0.2), 0.009488,
        [0, 0.087068, -0.143551, 0, -0.035448, -0.032075, 0, 0.039391, 0.053173, -0.106345, 0],
    ),
    "DAPO": (
        DEVIATION, "tokens", Policy("token", 0.2, 0.28), 0.036339,
        [0, 0.094983, -0.078300, 0, -0.058006, -0.052486, 0.064107, 0.042972, 0.058006, -0.116013, 0],
    ),
    "Dr. GRPO": (
        MEAN, "constant", Policy("token", 0.2, 0.2), 0.012136,
        [0, 0.025134, -0.020720, 0, -0.015350, -0.013889, 0, 0.011371, 0.015350, -0.030699, 0],
    ),
    "CISPO": (
        DEVIATION, "tokens", Policy("cispo", high=0.28), -0.044877,
        [0.134365, 0.094983, -0.067183, -0.038883, -0.058006, -0.052486, 0.064107, 0.042972, 0.058006, -0.116013,
         -0.070365],
    ),
    "GSPO": (
        DEVIATION, "answers", Policy("sequence", 0.05, 0.06), 0.020265,
        [0, 0, -0.143551, 0, 0, 0, 0, 0.045766, 0.045766, 0, 0],
    ),
    "on policy": (MEAN, "tokens", Policy(), -0.057576, None),  # the weights are A ÷ N
}  # fmt: skip


def divisor(kind, answer):
    return {"tokens": 1 / N, "answers": 1 / (M * len(answer)), "constant": 1 / (M * LONGEST)}[kind]


def example(advantages, kind):
    """(log-probabilities, PolicyTokens) of the example."""
    x = torch.tensor([value for answer in RATIOS for value in answer], dtype=torch.float64)
    numbers = torch.tensor([i for i, answer in enumerate(RATIOS) for _ in answer])
    weights = [a * divisor(kind, answer) for a, answer in zip(advantages, RATIOS, strict=True) for _ in answer]
    return x + OLD, PolicyTokens(numbers, torch.tensor(weights).double(), torch.full_like(x, OLD))


@pytest.mark.parametrize("name", EXAMPLES)
def test_loss_and_weights_of_the_example(name):
    advantages, kind, policy, loss, weights = EXAMPLES[name]
    log_probs, given = example(advantages, kind)
    x = log_ratios(log_probs, given, torch.ones_like(log_probs, dtype=torch.bool), policy)
    ours, weight = policy_terms(log_probs, x, given, policy)
    assert ours.sum().item() == pytest.approx(loss, abs=1e-6)
    expected = weights or given.loss_weights.tolist()
    assert weight.tolist() == pytest.approx(expected, abs=1e-6)


def test_kl_of_the_example_and_the_gradient_of_its_first_token():
    log_probs, given = example([0] * M, "tokens")
    ones = torch.ones_like(log_probs)
    for old, value, slope in ((None, 0.045296, None), (given.old_log_probs, 0.057119, 0.674929)):
        kl = PolicyTokens(given.answer_ids, 0 * ones, old, START * ones, ones)
        x = log_ratios(log_probs, kl, ones.bool(), Policy())
        loss, weight = policy_terms(log_probs, x, kl, Policy())
        assert loss.mean().item() == pytest.approx(value, abs=1e-6)
        if slope:
            assert -weight[0].item() == pytest.approx(slope, abs=1e-6)


def test_bounds_cut_off_what_would_go_on_in_the_same_direction():
    x, advantages = torch.tensor([0.5, 0.5, -0.5, -0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    low, high = clipped_tokens(x, advantages, Policy("token", 0.2, 0.28))
    assert low.tolist() == [False, False, False, True] and high.tolist() == [True, False, False, False]


def test_weights_times_the_slope_of_cross_entropy():
    """With logits (1, 2, −30), cap 15: log π is −0.316039, and a weight of ρ·A scales the slope of cross-entropy."""
    logits, target = torch.tensor([[1.0, 2.0, -30.0]]), torch.tensor([1])
    nll, slope = nll_and_slope(logits, target, torch.tensor([0.5]), 15.0)
    assert nll.item() == pytest.approx(0.5 * 0.316039, abs=1e-6)
    assert slope[0].tolist() == pytest.approx([0.134884, -0.133104, 0], abs=1e-6)
    nll, slope = nll_and_slope(logits, target, torch.ones(1), 15.0)
    given = PolicyTokens(torch.zeros(1, dtype=torch.long), torch.tensor([0.5]), torch.tensor([-0.6]))
    policy = Policy("token", 0.9, 0.9)
    _, weight = policy_terms(-nll, log_ratios(-nll, given, torch.tensor([True]), policy), given, policy)
    assert weight.item() == pytest.approx(0.664190, abs=1e-6)
    assert (slope * weight)[0].tolist() == pytest.approx([0.179178, -0.176813, 0], abs=1e-6)


# The whole model against a loss that is written out, for every choice


def written_out(model, batch, policy):
    """Σ of the tokens' losses as the papers write them, from all logits, by autograd; log π and entropies."""
    hidden = model.model(batch["input_ids"], position_ids=batch["position_ids"]).last_hidden_state
    spread = (model.logits(hidden) / policy.temperature).log_softmax(-1)
    total, labels = 0, batch["shift_labels"]
    chosen = spread.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    for number in range(int(batch["answer_ids"].max()) + 1):
        mine = [tuple(p) for p in ((batch["answer_ids"] == number) & (labels != -100)).nonzero().tolist()]
        if not mine:
            continue
        logs = torch.stack([chosen[p] for p in mine])
        olds = batch["old_log_probs"][tuple(zip(*mine, strict=True))] if "old_log_probs" in batch else logs.detach()
        answer = (logs - olds).mean().exp()
        for place, log, old in zip(mine, logs, olds, strict=True):
            a, ratio = batch["loss_weights"][place], (log - old).exp()
            if policy.clip == "none":
                total = total - a * log
            elif policy.clip == "cispo":
                total = total - ratio.detach().clamp(max=1 + policy.high) * a * log
            else:
                r = answer if policy.clip == "sequence" else ratio
                total = total - torch.minimum(r * a, r.clamp(1 - policy.low, 1 + policy.high) * a)
            if "kl_weights" in batch:
                d = batch["start_log_probs"][place] - log
                total = total + batch["kl_weights"][place] * ratio * (d.exp() - d - 1)
    return total, chosen.masked_fill(labels == -100, 0), -(spread.exp() * spread).sum(-1)


def made_batch(kl=False, old=True):
    """Two rows with three answers, one of them over two stretches (a tool's tokens between), and padding."""
    ids = tokens(2, 12)
    labels = torch.roll(ids, -1, 1)
    answers = torch.tensor([[0] * 6 + [1] * 6, [2] * 12])
    labels[0, :2] = labels[0, 6:8] = labels[1, :3] = labels[1, 6:8] = labels[1, 11:] = -100
    places = torch.tensor([[0, 1, 2, 3, 4, 5] * 2, list(range(12))])
    generator = torch.Generator().manual_seed(3)
    batch = {"input_ids": ids, "shift_labels": labels, "position_ids": places, "answer_ids": answers}
    batch["loss_weights"] = torch.tensor([0.7, -0.4, 1.1])[answers] + 0.01 * torch.rand(2, 12, generator=generator)
    if old:
        batch["old_log_probs"] = -4.6 + 0.3 * torch.randn(2, 12, generator=generator)
    if kl:
        batch["start_log_probs"] = -4.6 + 0.3 * torch.randn(2, 12, generator=generator)
        batch["kl_weights"] = 0.1 + 0.1 * torch.rand(2, 12, generator=generator)
    return batch


POLICIES = {
    "none": Policy(),
    "token": Policy("token", 0.2, 0.28),
    "cispo": Policy("cispo", high=0.1),
    "sequence": Policy("sequence", 0.05, 0.06),
}


@pytest.mark.parametrize("old", [True, False], ids=["several updates", "one update"])
@pytest.mark.parametrize("kl", [False, True], ids=["", "kl"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", POLICIES)
def test_the_gradient_is_autograds_of_the_written_out_loss(name, temperature, kl, old, monkeypatch):
    monkeypatch.setattr("nanochat_hf.model.modeling_nanochat_hf.LOSS_CHUNK", 5)  # several chunks, answers across them
    policy, model = POLICIES[name]._replace(temperature=temperature), build().double().train()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in made_batch(kl, old).items()}
    if policy.clip == "sequence":  # an answer's tokens share its advantage
        batch["loss_weights"] = batch["loss_weights"].round(decimals=1)
    if old:  # some ratios beyond the bounds, some within
        with torch.no_grad():
            batch["old_log_probs"] += written_out(model, batch, policy)[1] + 4.6
    model.policy = policy
    total, chosen, entropies = written_out(model, batch, policy)
    total.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    for head in ("plain", "wrapped"):
        if head == "wrapped":  # as an adapter would be: no weight to multiply with
            model.lm_head = nn.Sequential(model.lm_head)
        model.zero_grad()
        output = model(**batch, num_items_in_batch=1)
        torch.testing.assert_close(output.loss.double(), total.detach(), rtol=1e-5, atol=1e-6)
        output.loss.backward()
        for (n, value), p in zip(expected.items(), model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, value, rtol=2e-5, atol=2e-6, msg=lambda m, n=n: f"{n}: {m}")
        torch.testing.assert_close(output.log_probs.double(), chosen.detach().double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.entropies.double(), entropies.detach().double(), rtol=1e-5, atol=1e-5)
        assert output.logits is None and not output.log_probs.requires_grad


def test_log_probabilities_without_a_gradient_have_the_bits_of_training():
    model, batch = build().train(), made_batch()
    with torch.no_grad():
        before = model(**batch)
    assert torch.equal(before.log_probs, model(**batch).log_probs) and before.loss == 0


def test_on_policy_the_loss_is_the_weighted_cross_entropy_that_fine_tuning_has():
    model, batch = build().train(), made_batch(old=False)
    model(**batch).loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    del batch["answer_ids"]
    model(**batch).loss.backward()
    for ours, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-6)


def test_a_batch_without_a_target_gives_nothing():
    model, batch = build().train(), made_batch(kl=True)
    batch["shift_labels"][:] = -100
    for policy in POLICIES.values():
        model.policy = policy
        model(**batch).loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
