"""Tasks: where their rows come from, prompts, and the grades of right, wrong and odd answers."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import pytest

from nanochat_hf.tasks import TASKS, get_task
from nanochat_hf.tasks.base import answer_text, final_number, pair
from nanochat_hf.tasks.generated import BEE_QUESTIONS, draw_bee
from nanochat_hf.tasks.humaneval import first_code_block, imports
from nanochat_hf.tasks.multiple_choice import arc, mmlu, question
from nanochat_hf.tools.calculator import calculate

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not beside this checkout")


def test_the_prompt_is_the_documented_one():
    assert question("2+2?", ["3", "4"], "AB") == (
        "Multiple Choice question: 2+2?\n- 3=A\n- 4=B\n\nRespond only with the letter of the correct answer."
    )
    conversation = mmlu({"train": {"question": "2+2?", "choices": ["3", "4"], "answer": 1}})
    assert conversation["messages"][1]["content"] == "B" and conversation["letters"] == ["A", "B"]
    labels = {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    assert arc(labels)["letters"] == ["1", "2"] and get_task("arc_easy").grade(arc(labels), " 2 ")


LETTERS = [
    ("B", True),
    (" B ", True),
    ("B.", True),
    ("B)", True),
    ("(B)", True),
    ("B:", True),
    ("\nB\n", True),
    ("b", False),
    ("A", False),
    ("", False),
    (" ", False),
    ("B or C", False),
    ("BB", False),
    ("The answer is B", False),
    ("Because", False),
    ("B B", False),
    (".", False),
    ("()", False),
    ("B\0", False),
    ("\uff22", False),
]
NUMBERS = [
    ("#### 18", True),
    ("so #### 18.0", True),
    ("#### $18", True),
    ("#### 18.", True),
    ("####18", True),
    ("#### 18 dollars", True),
    ("#### 18\n\nQ: more", True),
    ("#### 17 #### 18", True),
    ("#### 018", True),
    ("#### 18.00", True),
    ("#### 1,8", True),
    ("#### -18", False),
    ("#### 18 #### 17", False),
    ("#### 1.8.0", False),
    ("#### 180", False),
    ("#### 1800", False),
    ("#### 1 8", False),
    ("18", False),
    ("The answer is 18", False),
    ("### 18", False),
    ("####", False),
    ("#### ", False),
    ("#### eighteen", False),
    ("", False),
    ("#### ,", False),
    ("#### $", False),
    ("#### x18", False),
    ("#### 18,5", False),
]
CODE = "def double(x):\n    return 2 * x"
PROGRAMS = [
    (f"```python\n{CODE}\n```", True),
    (f"```\n{CODE}\n```", True),
    (f"Here:\n\n```py\n{CODE}\n```\nIt doubles.", True),
    (CODE, True),
    (f"```python\n{CODE}", True),
    (f"```python\n{CODE}\n```\n```python\ndef double(x): return 0\n```", True),
    (f"```python\ndef double(x): return 0\n```\n```python\n{CODE}\n```", False),
    ("```python\ndef double(x):\n    return Tuple[0]\n```", False),
    ("def double(x: List[int]):\n    return x + x", True),
    ("```python\ndef twice(x): return 2 * x\n```", False),
    ("", False),
    ("I cannot do that.", False),
    ("    return 2 * x", False),
    ("import sys\nsys.exit(0)", False),
    ("import os\nos._exit(0)", False),
    ("```python\n```", False),
    (f"{CODE}\nif __name__ == '__main__':\n    raise SystemExit", True),
    ("def double(x): return 2 * x  # é", True),
]
SPELLED = [
    ("apple:a,p,p,l,e", True),
    (" apple:a,p,p,l,e\n", True),
    ("apple:a,p,l,e", False),
    ("a,p,p,l,e", False),
    ("apple: a, p, p, l, e", False),
    ("Apple:A,P,P,L,E", False),
    ("apple:a,p,p,l,e,", False),
    ("apple:a,p,p,l,e and more", False),
    ("", False),
]
SAID = [
    ("Hello, you!", True),
    ("  Hello, you!\n", True),
    ("Hello, you", False),
    ("hello, you!", False),
    ("Hello, you! And more", False),
    ("", False),
]
TABLES = {
    "gsm8k": NUMBERS,
    "spelling_bee": NUMBERS,
    "calculator": NUMBERS,
    "mmlu": LETTERS,
    "arc_easy": LETTERS,
    "arc_challenge": LETTERS,
    "humaneval": PROGRAMS,
    "simple_spelling": SPELLED,
    "random_spelling": SPELLED,
    "identity": SAID,
    "smoltalk": SAID,
    "custom_json": SAID,
}


@pytest.fixture(scope="module")
def conversations():
    """For every task the conversation whose answers the tables grade."""
    parts = [
        {"type": "text", "text": "9+9="},
        {"type": "python", "text": "9+9"},
        {"type": "python_output", "text": "18"},
        {"type": "text", "text": "18\n#### 18"},
    ]
    bee = {"word": "b" * 18 + "a", "letter": "b", "question": "How many {l} in {w}{q}"}
    lettered = {"question": "q", "choices": list("wxyz"), "answer": 1}
    arced = {"question": "q", "choices": {"text": list("wxyz"), "label": list("ABCD")}, "answerKey": "B"}
    human = {
        "prompt": "from typing import List\n\n\ndef double(x):\n    'Twice x.'\n",
        "canonical_solution": "    return 2 * x\n",
        "entry_point": "double",
        "test": "def check(candidate):\n    assert candidate(3) == 6 and candidate(0) == 0\n",
    }
    said = pair("hi", "Hello, you!")
    return {
        "gsm8k": pair("q", parts),
        "spelling_bee": get_task("spelling_bee").to_conversation(bee),
        "calculator": pair("q", "9+9#### 18"),
        "mmlu": mmlu(lettered),
        "arc_easy": arc(arced),
        "arc_challenge": arc(arced),
        "humaneval": get_task("humaneval").to_conversation(human),
        "simple_spelling": get_task("simple_spelling").to_conversation({"word": "apple"}),
        "random_spelling": get_task("random_spelling").to_conversation({"word": "apple"}),
        "identity": said,
        "smoltalk": said,
        "custom_json": said,
    }


def test_every_task_has_a_table():
    assert TABLES.keys() == TASKS.keys()


@pytest.mark.parametrize("name", sorted(TABLES))
def test_right_wrong_and_odd_answers(name, conversations):
    task, conversation = TASKS[name], conversations[name]
    assert task.grade(conversation, answer_text(conversation)) is True
    for answer, right in TABLES[name]:
        assert task.grade(conversation, answer) == right, (name, answer)


@pytest.mark.parametrize(
    "answer, number",
    [
        ("so #### $1,200.0", "1200"),
        ("#### -3", "-3"),
        ("#### - 3", "-3"),
        ("#### $-3", "-3"),
        ("#### -$3", "-3"),
        ("#### .5", "0.5"),
        ("#### 0", "0"),
        ("#### -0", "0"),
        ("#### 1,000,000", "1000000"),
        ("#### 1\n#### 2", "2"),
        ("#### 70,000 km", "70000"),
        ("no mark 7", None),
        ("#### none", None),
    ],
)
def test_the_number_behind_the_mark(answer, number):
    assert final_number(answer) == (None if number is None else Decimal(number))


@pytest.mark.parametrize("filling", [" ", "\n", "$", "-", ".", "1,", "#", "#### ", "#### -$ "])
def test_numbers_are_found_in_linear_time_in_whatever_a_model_writes(filling):
    """A hundred thousand of anything takes milliseconds; cubic time would take years."""
    began = time.process_time()
    assert final_number("#### " + filling * 100_000 + "x") is None or filling == "1,"
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "name, split, expected",
    [
        ("mmlu", "test", ("cais/mmlu", "all", "test")),
        ("mmlu", "validation", ("cais/mmlu", "all", "validation")),
        ("mmlu", "auxiliary_train", ("cais/mmlu", "auxiliary_train", "train")),
        ("arc_easy", "test", ("allenai/ai2_arc", "ARC-Easy", "test")),
        ("arc_challenge", "train", ("allenai/ai2_arc", "ARC-Challenge", "train")),
        ("gsm8k", "test", ("openai/gsm8k", "main", "test")),
        ("humaneval", "test", ("openai/openai_humaneval", None, "test")),
        ("smoltalk", "test", ("HuggingFaceTB/smol-smoltalk", None, "test")),
    ],
)
def test_the_hub_is_asked_for_the_right_configuration_and_split(name, split, expected, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "datasets.load_dataset", lambda name, config=None, split=None: asked.append((name, config, split)) or []
    )
    TASKS[name].load(split)
    assert asked == [expected]


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nowhere.jsonl.*cannot be loaded .*; check the file$"):
        get_task("gsm8k").load("test", path=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="word list .*none.txt: cannot be read"):
        get_task("spelling_bee").load("test", path=str(tmp_path / "none.txt"))

    def unreachable(*arguments, **keywords):
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"openai/gsm8k, split 'test': cannot be loaded \(Couldn't reach the Hub\); .* in a recipe$"
    ):
        get_task("gsm8k").load("test")


def test_spelling_questions_vary_and_are_those_of_their_index(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(
        "".join(f"{a}{b}word\r\n" for a in "abcdefghijklmnopqrst" for b in "aeiouxyz") + "not-a-word\n\n", newline=""
    )
    task, spelling = get_task("spelling_bee"), get_task("simple_spelling")
    rows, held_out = (task.load(split, path=str(path), limit=1500) for split in ("train", "test"))
    assert rows[:40] == task.load("train", path=str(path), limit=40) and rows[:40] != held_out[:40]
    assert rows[7] == draw_bee(random.Random(7), "train", str(path)) and held_out[7] == draw_bee(
        random.Random(10_000_007), "test", str(path)
    )
    assert not {row["word"] for row in rows} & {row["word"] for row in held_out}
    within = sum(row["letter"] in row["word"] for row in rows) / len(rows)
    assert 0.9 < within < 0.96  # nine times out of ten, and by chance
    questions = [task.to_conversation(row)["messages"][0]["content"] for row in rows]
    assert {row["question"] for row in rows} == set(BEE_QUESTIONS) and len(BEE_QUESTIONS) > 30
    for expected in ('"', "'", "?", "Wie ", "Combien ", "Cuántas", "里有多少"):
        assert 0 < sum(expected in question for question in questions) < len(questions), expected
    assert all(row["word"] in q and not any(c in q for c in "{}") for row, q in zip(rows, questions, strict=True))
    for row in rows[:200]:
        parts = task.to_conversation(row)["messages"][1]["content"]
        assert parts[2]["text"] == str(row["word"].count(row["letter"])) == calculate(parts[1]["text"])
        assert (
            parts[0]["text"].startswith(f"{row['word']}:{','.join(row['word'])}\n")
            and parts[3]["text"] == f"\n#### {parts[2]['text']}"
        )
    asked = spelling.to_conversation({"word": "apple"})["messages"]
    assert [m["content"] for m in asked] == ["Spell the word: apple", "apple:a,p,p,l,e"]


def test_a_task_of_ones_own_is_named_by_its_module(tmp_path, monkeypatch):
    text = "from nanochat_hf.tasks.base import Task, pair, same_text\n"
    text += "MINE = Task('mine', lambda *a, **k: [1], lambda row: pair('q', 'a'), same_text)\n"
    (tmp_path / "own_task_here.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert get_task("own_task_here:MINE").to_conversation(1) == pair("q", "a")
    with pytest.raises(ValueError, match=r"task own_task_here:NONE: cannot be imported \(.*\); correct"):
        get_task("own_task_here:NONE")
    with pytest.raises(ValueError, match="task math:pi: is float, no Task"):
        get_task("math:pi")


def test_strings_to_spell_are_random_and_held_out():
    task = get_task("random_spelling")
    rows, held_out = ([row["word"] for row in task.load(split, limit=400)] for split in ("train", "test"))
    assert rows[:50] == [row["word"] for row in task.load("train", limit=50)]
    assert not set(rows) & set(held_out) and {len(word) for word in rows + held_out} == {7, 8}
    assert {letter for word in held_out for letter in word} == set("abcdefghijklmnopqrstuvwxyz")


def test_held_out_questions_about_the_model_are_other_phrasings():
    task = get_task("identity")
    rows = {split: {row["question"] for row in task.load(split, limit=500)} for split in ("train", "test")}
    assert rows["train"] and rows["test"] and not rows["train"] & rows["test"]


def test_imports_and_blocks_of_a_completion():
    assert (
        imports("import math\nfrom typing import List\n\ndef f():\n    import os\n")
        == "import math\nfrom typing import List"
    )
    assert imports("import math\nthis is not python") == "import math"
    assert first_code_block("so:\n```python\nx = 1\n```\nand\n```\ny\n```") == "x = 1"


@needs_data
@pytest.mark.parametrize("step", [16, pytest.param(1, marks=pytest.mark.slow)])
def test_canonical_solutions_pass(step):
    task = get_task("humaneval")
    rows = task.load(path=str(DATA / "humaneval/HumanEval.jsonl.gz"))
    assert len(rows) == 164
    conversations = [task.to_conversation(rows[i]) for i in range(0, 164, step)]
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda c: task.grade(c, answer_text(c)), conversations))
        assert not any(pool.map(lambda c: task.grade(c, c["messages"][0]["content"] + "    pass"), conversations[:10]))


def test_own_lines_are_read_and_named_when_wrong(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]\n{"messages": []}\n')
    task = get_task("custom_json")
    assert [len(task.to_conversation(row)["messages"]) for row in task.load(path=path)] == [2, 0]
    path.write_text("{}\nnot json\n")
    with pytest.raises(ValueError, match="line 2: not JSON"):
        list(task.load(path=path))
    with pytest.raises(ValueError, match="does not exist"):
        task.load(path=tmp_path / "none")
    with pytest.raises(ValueError, match="unknown; choose from arc_challenge"):
        get_task("sums")


@needs_data
@pytest.mark.parametrize(
    "name, path",
    [
        ("mmlu", "mmlu/test.parquet"),
        ("arc_easy", "arc/ARC-Easy/test.parquet"),
        ("arc_challenge", "arc/ARC-Challenge/test.parquet"),
        ("gsm8k", "gsm8k/test.jsonl.gz"),
        ("gsm8k", "gsm8k/train.jsonl.gz"),
    ],
)
def test_gold_answers_grade_as_right(name, path):
    task = TASKS[name]
    rows = task.load(path=str(DATA / path))
    for row in rows:
        conversation = task.to_conversation(row)
        assert task.grade(conversation, answer_text(conversation))
    assert len(rows) > 1000


def test_an_unknown_task_is_told_with_the_one_it_resembles():
    with pytest.raises(
        ValueError, match=r"task 'spellingbee' \(did you mean 'spelling_bee'\?\) is unknown; choose from arc_challenge"
    ):
        get_task("spellingbee")
