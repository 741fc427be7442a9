"""Answers as the model writes them: ends, tools, log-probabilities; and the twin that writes them."""

import dataclasses

import pytest
import torch

from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.generation import Completion, Engine
from nanochat_hf.machine.weights import Twin
from nanochat_hf.rl.answers import Sampling, Writer
from nanochat_hf.rl.questions import Question, Questions
from nanochat_hf.rl.rows import Row, lay_out
from nanochat_hf.tasks.base import pair
from nanochat_hf.tokenizer import train_tokenizer
from tests.support.models import build

SAMPLING = Sampling(samples=3, max_new_tokens=10, temperature=0.8, top_k=None, rows=4)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The cat counted 12 letters."] * 3, 280)


@pytest.fixture(scope="module")
def model():
    return build(vocab_size=280, max_position_embeddings=64)


def asked(*prompts):
    return [Question("test", pair("q", "a"), tuple(prompt), None) for prompt in prompts]


def writer(model, tokenizer, **changed):
    made = Writer(model, tokenizer, dataclasses.replace(SAMPLING, **changed), longest=12)
    made.refresh()
    return made


PROMPTS = [5, 6, 7], [9, 10, 11, 12, 13], [40], [41, 42]


def test_answers_are_those_of_the_engine_whatever_runs_beside_them(model, tokenizer):
    seeds = ["0 0 3", "0 0 1", "0 1 3", "0 0 2"]
    together = writer(model, tokenizer)(asked(*PROMPTS), seeds)
    alone = [writer(model, tokenizer, rows=1)(asked(p), [s])[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    settings = {"max_new_tokens": 10, "temperature": 0.8, "num_samples": 3}
    for ours, theirs, prompt, seed in zip(together, alone, PROMPTS, seeds, strict=True):
        assert [a.ids for a in ours] == [a.ids for a in theirs] and len({a.ids for a in ours}) > 1
        (expected,) = Engine(model, tokenizer).generate([list(prompt)], seed=[seed], **settings)
        assert [list(a.ids[: len(c.ids)]) for a, c in zip(ours, expected, strict=True)] == [c.ids for c in expected]


def test_the_samplers_log_probabilities_are_those_of_training(model, tokenizer):
    answers = writer(model, tokenizer)(asked(*PROMPTS), list("abcd"))
    rows = [
        [Row((*p, *a.ids), (*[False] * len(p), *a.trained), 1.0, (*[0.0] * len(p), *a.log_probs)) for a in group]
        for p, group in zip(PROMPTS, answers, strict=True)
    ]
    batch = lay_out(rows, positions=48, pad=0)
    batch.pop("factors")
    model.policy = model.policy._replace(temperature=0.8)
    with torch.no_grad():
        found = model.train()(**batch).log_probs
    model.eval()
    keep = batch["shift_labels"] != -100
    assert keep.sum() == sum(a.length for group in answers for a in group) > 60
    torch.testing.assert_close(found[keep], batch["sampler_log_probs"][keep], rtol=1e-4, atol=1e-4)


def test_the_end_is_kept_and_forced_tokens_are_not_trained(model, tokenizer):
    made, vocabulary = writer(model, tokenizer), tokenizer.get_vocab()
    end, bos, start, stop = (vocabulary[f"<|{t}|>"] for t in ("assistant_end", "bos", "output_start", "output_end"))
    forced = [False, True, True, True, False]
    scores = [-1.0, 0.0, 0.0, 0.0, -1.0, -2.0]
    good = made.answer(Completion([7, start, 8, stop, 9], forced, "t", True, end, scores))
    assert good.ids == (7, start, 8, stop, 9, end) and good.trained == (True, False, False, False, True, True)
    assert (good.length, good.finished, good.forged, good.log_probs) == (3, True, False, tuple(scores))
    cut = made.answer(Completion([7, 8], [False, False], "t", False, None, [-1.0, -1.0]))
    assert cut.ids == (7, 8) and not cut.finished
    other = made.answer(Completion([7], [False], "t", True, bos, [-1.0, -1.0]))
    assert other.ids == (7, bos) and not other.finished  # bos ends the row, but it is no end of an answer
    assert made.answer(Completion([7, start, 8, stop], [False] * 4, "t", True, end, [])).forged


def test_a_twin_follows_the_weights_without_a_copy_where_it_can(model):
    twin = Twin(model, torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    shared = model.lm_head.weight.data_ptr() == twin.model.lm_head.weight.data_ptr()
    assert shared and torch.equal(twin.model(ids).logits, model(ids).logits)
    half = Twin(model, torch.bfloat16)
    address = half.model.lm_head.weight.data_ptr()
    before = half.model(ids).logits.clone()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert torch.equal(twin.refresh()(ids).logits, model(ids).logits)
    assert torch.equal(half.model(ids).logits, before) and not torch.equal(half.refresh()(ids).logits, before)
    assert half.model.lm_head.weight.data_ptr() == address and half.model.model.resid_lambdas.dtype == torch.float32
    with torch.no_grad():
        model.lm_head.weight.div_(1.5)


def test_questions_of_tasks_have_a_grade_and_long_prompts_are_counted(tokenizer, tmp_path):
    (tmp_path / "chats.jsonl").write_text(
        '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]\n'
        f'[{{"role": "user", "content": "{"long " * 50}"}}, {{"role": "assistant", "content": "yo"}}]\n'
    )
    sources = [
        SourceConfig(task="calculator", rows=3, repeat=2),
        SourceConfig(path=str(tmp_path / "chats.jsonl")),
    ]
    found = Questions.load(sources, tokenizer, most=60)
    assert [question.source for question in found][:6] == ["calculator"] * 6 and len(found) == 7
    assert found[0].grade and found[6].grade is None and found.report.total("dropped") == 1
    assert found.longest == max(len(question.prompt) for question in found) <= 60
    assert found.digest != Questions.load(sources[:1], tokenizer, most=60).digest
    with pytest.raises(ValueError, match=r"no question has a prompt of at most 2 tokens; raise --max-seq-len"):
        Questions.load(sources, tokenizer, most=2)
