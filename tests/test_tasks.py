"""Tasks: prompts, grades of right, wrong and odd answers, the letter's logits in batches, ChatCORE."""

from decimal import Decimal
from pathlib import Path

import pytest
import torch

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.conversation import render_prompt
from nanochat_hf.evals.chat import TaskResult, chat_core, evaluate_task
from nanochat_hf.tasks import TASKS, get_task
from nanochat_hf.tasks.base import answer_text, final_number, pair
from nanochat_hf.tasks.multiple_choice import arc, mmlu, question
from nanochat_hf.tokenizer import train_tokenizer

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not beside this checkout")


def test_the_prompt_is_the_documented_one():
    assert question("2+2?", ["3", "4"], "AB") == (
        "Multiple Choice question: 2+2?\n- 3=A\n- 4=B\n\nRespond only with the letter of the correct answer."
    )
    conversation = mmlu({"train": {"question": "2+2?", "choices": ["3", "4"], "answer": 1}})
    assert conversation["messages"][1]["content"] == "B" and conversation["letters"] == ["A", "B"]
    labels = {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    assert arc(labels)["letters"] == ["1", "2"] and get_task("arc_easy").grade(arc(labels), " 2 ")


@pytest.mark.parametrize("answer, right", [
    ("#### 18", True), ("so #### 18.0", True), ("#### $18", True), ("#### 18.", True), ("#### -18", False), ("#### 1,8", True), ("18", False),
    ("#### 180", False), ("#### 17 #### 18", True), ("#### 18 #### 17", False), ("#### 1.8.0", False), ("####", False),
])  # fmt: skip
def test_numbers_are_compared_as_numbers(answer, right):
    assert get_task("gsm8k").grade(pair("q", "so #### 18"), answer) == right
    assert final_number("so #### $1,200.0") == Decimal("1200")


def test_letters_of_a_batch_are_those_of_each_prompt_alone():
    tokenizer = train_tokenizer(["A B C D Multiple Choice question letter"] * 3, 280)
    torch.manual_seed(0)
    model = NanochatForCausalLM(NanochatConfig(vocab_size=280, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    rows = [{"question": "why " * n, "choices": list("wxyz"), "answer": n % 4} for n in range(1, 12)]
    result = evaluate_task(model, tokenizer, get_task("mmlu"), rows, batch_size=4, progress=False)
    for row, answer in zip(rows, result.answers, strict=True):
        prompt = torch.tensor([render_prompt(tokenizer, mmlu(row))])
        ids = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ABCD"]
        best = "ABCD"[int(model(prompt).logits[0, -1, ids].argmax())]
        assert answer["answer"] == best and answer["correct"] == (best == "ABCD"[row["answer"]])
    assert result.correct == sum(answer["correct"] for answer in result.answers)


def test_chat_core_is_centred():
    assert chat_core([(TaskResult("a", 25, 100), 0.25), (TaskResult("b", 50, 100), 0.0)]) == pytest.approx(0.25)


def test_own_lines_are_read_and_named_when_wrong(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]\n{"messages": []}\n')
    task = get_task("custom_json")
    assert [len(task.to_conversation(row)["messages"]) for row in task.load(path=path)] == [2, 0]
    path.write_text("{}\nnot json\n")
    with pytest.raises(ValueError, match="line 2: not JSON"):
        task.load(path=path)
    with pytest.raises(ValueError, match="does not exist"):
        task.load(path=tmp_path / "none")
    with pytest.raises(ValueError, match="unknown; choose from arc_challenge"):
        get_task("sums")


@needs_data
@pytest.mark.parametrize("name, path", [
    ("mmlu", "mmlu/test.parquet"), ("arc_easy", "arc/ARC-Easy/test.parquet"), ("arc_challenge", "arc/ARC-Challenge/test.parquet"),
    ("gsm8k", "gsm8k/test.jsonl.gz"),
])  # fmt: skip
def test_gold_answers_grade_as_right(name, path):
    task = TASKS[name]
    rows = task.load(path=str(DATA / path))
    for row in rows:
        conversation = task.to_conversation(row)
        assert task.grade(conversation, answer_text(conversation))
    assert len(rows) > 1000
