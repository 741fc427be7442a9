"""pass@k: the estimator, its standard error, and sampled answers on one process and two."""

import itertools
import statistics

import pytest

from nanochat_hf.evals.sampled import SampledOptions, SampledResult, evaluate_sampled, pass_at_k
from nanochat_hf.tasks.base import Task, pair
from nanochat_hf.tokenizer import train_tokenizer
from tests.support.models import build


@pytest.mark.parametrize("right", [0, 1, 3, 6])
@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_all_choices_of_k_answers(right, k):
    answers = [i < right for i in range(6)]
    choices = list(itertools.combinations(answers, k))
    assert pass_at_k(6, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_of_the_paper_and_of_too_few_answers():
    assert [pass_at_k(16, 3, k) for k in (1, 4, 8)] == pytest.approx([0.1875, 0.607143, 0.9], abs=1e-6)
    with pytest.raises(ValueError, match="pass@5 needs at least 5 answers, there are 4"):
        pass_at_k(4, 1, 5)


def test_over_questions_it_is_the_mean_and_its_error_that_of_a_mean():
    result = SampledResult("x", 4, (0, 1, 4))
    each = [pass_at_k(4, right, 2) for right in (0, 1, 4)]
    assert result.pass_at(2) == pytest.approx(statistics.mean(each))
    assert result.stderr(2) == pytest.approx(statistics.stdev(each) / 3**0.5)
    assert SampledResult("x", 4, (2,)).stderr(1) == 0


def test_sampled_answers_do_not_depend_on_the_rows_at_a_time():
    tokenizer = train_tokenizer(["The cat counted 12 letters."] * 3, 280)
    model = build(vocab_size=280, max_position_embeddings=64)
    texts: dict[str, list[str]] = {}

    def grade(conversation, text):
        texts.setdefault(conversation["messages"][0]["content"], []).append(text)
        return len(text) % 2 == 0

    task = Task("odd", lambda: None, lambda row: pair(row, "x"), grade)
    found = []
    for rows in (3, 16):
        texts.clear()
        result = evaluate_sampled(model, tokenizer, task, ["a?", "which one?"], SampledOptions(4, 6, rows=rows))
        found.append((result, {question: sorted(answers) for question, answers in texts.items()}))
    assert found[0] == found[1] and len(set(found[0][1]["a?"])) > 1
    with pytest.raises(ValueError, match="no rows to evaluate"):
        evaluate_sampled(model, tokenizer, task, [], SampledOptions())
