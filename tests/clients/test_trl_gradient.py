"""The gradient of a step of chat_rl is that of TRL's GRPOTrainer on the same answers, for every choice both have."""

import numpy as np
import pytest
import torch

from nanochat_hf.model.policy_nanochat_hf import Policy
from nanochat_hf.rl.objectives import advantages, token_factors
from nanochat_hf.rl.rows import Row, Shape, micro_batches
from nanochat_hf.tokenizer import train_tokenizer
from tests.support.models import build

grpo = pytest.importorskip("trl.trainer.grpo_trainer", reason="trl is not installed")

PROMPT, LONGEST = 4, 9  # prompts of one length, so that nothing is padded on the left
LENGTHS = (9, 4, 6, 3, 8, 5)
REWARDS = ((1.0, 0.0, 0.0), (1.0, 1.0, 0.0))
# our flags, TRL's
CHOICES = {
    "dapo": (("mean", "tokens", Policy("token", 0.2, 0.28)), {"loss_type": "dapo", "scale_rewards": "none"}),
    "grpo": (("deviation", "answers", Policy("token", 0.2, 0.2)), {"loss_type": "grpo", "epsilon_high": 0.2}),
    "dr_grpo": (("mean", "constant", Policy("token", 0.2, 0.28)), {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    # TRL's bound of cispo is the ratio itself
    "cispo": (("deviation", "tokens", Policy("cispo", high=0.1)), {"loss_type": "cispo", "epsilon_high": 1.1}),
    "gspo": (
        ("deviation", "answers", Policy("sequence", 0.02, 0.03)),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    ),
    "kl": (
        ("mean", "tokens", Policy("token", 0.2, 0.28)),
        {"loss_type": "dapo", "scale_rewards": "none", "beta": 0.3, "use_bias_correction_kl": True},
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The cat counted 12 letters."] * 3, 280)


def answers():
    draw = np.random.default_rng(0)
    prompts = [draw.integers(5, 90, PROMPT).tolist() for _ in REWARDS]
    return [(prompts[i // 3], draw.integers(5, 90, n).tolist()) for i, n in enumerate(LENGTHS)]


def trainer(model, tokenizer, settings, folder):
    from datasets import Dataset

    args = grpo.GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=6,
        num_generations=3,
        max_completion_length=LONGEST,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        **({"epsilon": 0.2, "epsilon_high": 0.28, "temperature": 1.0} | settings | {"beta": 0.0}),
    )
    made = grpo.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **more: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"] * 3}),
        processing_class=tokenizer,
    )
    made.beta = settings.get("beta", 0.0)  # not by the arguments, which would load the start by its name
    return made


def noise(seed):
    return [0.3 * np.random.default_rng((seed, i)).standard_normal(n) for i, n in enumerate(LENGTHS)]


@pytest.mark.parametrize("name", CHOICES)
def test_gradients_are_trls(name, tokenizer, tmp_path):
    (kind, normalisation, policy), settings = CHOICES[name]
    # no padding of the head, all of whose rows TRL takes for tokens
    model = build(vocab_size=280, max_position_embeddings=64, pad_vocab_to_multiple_of=1).train()
    scores = np.concatenate([advantages(np.array(group), kind) for group in REWARDS])
    factors = token_factors(LENGTHS, normalisation, LONGEST)
    rows = [
        Row(
            (*prompt, *ids),
            (*[False] * PROMPT, *[True] * len(ids)),
            float(score * factor),
            (0.0,) * (PROMPT + len(ids)),
            float(factor),
        )
        for (prompt, ids), score, factor in zip(answers(), scores, factors, strict=True)
    ]
    (batch,) = micro_batches(rows, Shape(6, PROMPT + LONGEST - 1, 1), pad=0)
    model.policy = policy
    with torch.no_grad():
        now = model(**{k: v for k, v in batch.items() if k != "factors"}).log_probs
    old, start, places = now.clone(), now.clone(), (batch["shift_labels"] != -100).nonzero()
    beta, kept = settings.get("beta", 0.0), batch.pop("factors")
    theirs_old, theirs_start, theirs_now = (torch.zeros(6, LONGEST) for _ in range(3))
    for place, (answer, token) in zip(places.tolist(), numbered(batch), strict=True):
        place = tuple(place)
        old[place] += noise(1)[answer][token]
        start[place] += noise(2)[answer][token]
        theirs_old[answer, token], theirs_start[answer, token] = old[place], start[place]
        theirs_now[answer, token] = now[place]
    batch |= {"old_log_probs": old}
    if beta:
        batch |= {"start_log_probs": start, "kl_weights": beta * kept}
    model(**batch, num_items_in_batch=sum(LENGTHS)).loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    pad = [[0] * (LONGEST - n) for n in LENGTHS]
    inputs = {
        "prompt_ids": torch.tensor([prompt for prompt, _ in answers()]),
        "prompt_mask": torch.ones(6, PROMPT, dtype=torch.long),
        "completion_ids": torch.tensor([ids + more for (_, ids), more in zip(answers(), pad, strict=True)]),
        "completion_mask": torch.tensor([[1] * n + more for n, more in zip(LENGTHS, pad, strict=True)]),
        "advantages": torch.tensor(scores).float(),
        "old_per_token_logps": theirs_old,
        "ref_per_token_logps": theirs_start,
        "num_items_in_batch": torch.tensor(float(sum(LENGTHS))),
    }
    other = trainer(model, tokenizer, settings, tmp_path)
    other.current_gradient_accumulation_steps = 1
    other.model.train()
    other._compute_loss(other.model, inputs).backward()
    for n, p in model.named_parameters():
        apart = (ours[n] - p.grad).norm() / p.grad.norm().clamp(min=1e-12)
        assert apart < (1e-4 if p.ndim > 1 else 1e-3), (n, apart.item())


def numbered(batch):
    """(answer, number of its token) of every target of a batch, in the order of its rows."""
    seen: dict[int, int] = {}
    by_ids = {tuple(ids): i for i, (_, ids) in enumerate(answers())}
    labels, numbers = batch["shift_labels"], batch["answer_ids"]
    wholes = {n: tuple(labels[(numbers == n) & (labels != -100)].tolist()) for n in numbers.unique().tolist()}
    for r, t in (labels != -100).nonzero().tolist():
        number = int(numbers[r, t])
        answer = by_ids[wholes[number]]
        yield answer, seen.setdefault(answer, 0)
        seen[answer] += 1
