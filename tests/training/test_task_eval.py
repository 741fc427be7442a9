"""Tasks that are evaluated during fine-tuning: accuracies, ChatCORE, pass@k, their cadence and what is refused."""

import json
import shutil

import pytest

from nanochat_hf.evals.chat import ChatOptions, chat_core, chosen_tasks, evaluate_task, evaluation_rows
from nanochat_hf.model import NanochatForCausalLM
from nanochat_hf.tokenizer import load_tokenizer
from nanochat_hf.training.tracking import read_metrics
from tests.support.training import here, train

CHOICES = [{"question": "why " * (n % 5), "choices": list("wxyz"), "answer": n % 4} for n in range(1, 30)]
FLAGS = {"task_every": 2, "task_limit": 23, "task_tokens": 4, "num_steps": 4, "save_every": 2}


@pytest.fixture
def recipe(tmp_path):
    """A recipe whose eval_data are letters to choose and words to spell, both in files."""
    (tmp_path / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    (tmp_path / "words.txt").write_text("".join(f"{a}{b}n\n" for a in "bcdfghjklm" for b in "aeiou"))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"eval_data:\n  - {{task: mmlu, path: {tmp_path}/mmlu.jsonl}}\n"
        f"  - {{task: spelling_bee, path: {tmp_path}/words.txt}}\n"
    )
    return path


def logged(folder):
    """{name: {step: value}} of all evaluations of tasks."""
    found = {}
    for entry in read_metrics(folder / "metrics.jsonl"):
        for name, value in entry.items():
            if name.startswith("eval/"):
                found.setdefault(name, {})[entry["step"]] = value
    return found


def test_accuracies_and_chatcore_at_their_cadence_are_those_of_the_exported_model(start, recipe, tmp_path):
    assert here(start, tmp_path / "run", config=recipe, **FLAGS) == 0
    found = logged(tmp_path / "run")
    assert {name: list(values) for name, values in found.items()} == {
        name: [0, 2, 4] for name in ("eval/mmlu", "eval/spelling_bee", "eval/chatcore")
    }
    final = tmp_path / "run" / "final"
    model, tokenizer = NanochatForCausalLM.from_pretrained(final).eval(), load_tokenizer(final)
    entries = [
        {"task": "mmlu", "path": str(tmp_path / "mmlu.jsonl")},
        {"task": "spelling_bee", "path": str(tmp_path / "words.txt")},
    ]
    results = []
    for task, path in chosen_tasks(None, entries):
        rows = evaluation_rows(task, path, 23)
        result = evaluate_task(model, tokenizer, task, rows, options=ChatOptions(64, 4, progress=False))
        assert found[f"eval/{task.name}"][4] == result.accuracy
        results.append((result, task.baseline))
    assert found["eval/chatcore"][4] == chat_core(results) and found["eval/mmlu"][4] > 0


def test_a_resumed_run_measures_what_was_due_and_two_processes_measure_the_same(start, recipe, tmp_path):
    pair = train(start, tmp_path / "2", tmp_path / "log", 2, config=recipe, **FLAGS)
    assert here(start, tmp_path / "1", config=recipe, **FLAGS) == 0
    whole = logged(tmp_path / "1")
    shutil.copytree(tmp_path / "1", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-000004")
    assert here(start, tmp_path / "again", config=recipe, resume="auto", **FLAGS) == 0
    assert logged(tmp_path / "again") == whole
    assert pair.wait() == [0, 0], pair.text()
    assert {name: values[0] for name, values in logged(tmp_path / "2").items()} == {
        name: values[0] for name, values in whole.items()
    }


def test_samples_give_pass_at_k(start, tmp_path):
    changed = FLAGS | {"task_eval": "simple_spelling", "task_samples": 3, "task_limit": 2}
    assert here(start, tmp_path / "run", **changed) == 0
    assert set(logged(tmp_path / "run")) == {f"eval/simple_spelling/pass@{k}" for k in (1, 2, 3)}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"task_eval": "spelling"}, "task 'spelling' (did you mean 'spelling_bee'?) is unknown"),
        ({"task_eval": "mmlu", "task_samples": 2}, "mmlu is answered by its likeliest letter"),
        ({"task_every": -1}, "--task-every -1 must be at least 0"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_training(start, recipe, tmp_path, capsys, changed, reason):
    assert here(start, tmp_path / "run", **{"config": recipe, **FLAGS, **changed}) == 2
    assert reason in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_nothing_is_evaluated_unless_asked_for(start, tmp_path):
    assert here(start, tmp_path / "run", num_steps=1) == 0
    assert logged(tmp_path / "run") == {}
