"""chat_eval: the same answers in any batch and on any number of processes, for our models and others."""

import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.cli import chat_eval
from nanochat_hf.conversation import render_prompt
from nanochat_hf.evals import chat
from nanochat_hf.evals.chat import (
    ChatOptions,
    TaskResult,
    chat_core,
    chat_core_stderr,
    evaluate_task,
    evaluation_rows,
    last_logits,
    length_sorted_batches,
)
from nanochat_hf.interop.folder import export
from nanochat_hf.tasks import get_task
from nanochat_hf.tasks.multiple_choice import mmlu
from nanochat_hf.tokenizer import train_tokenizer
from tests.support.processes import Run

QUIET = ChatOptions(progress=False)
MMLU = [{"question": "why " * n, "choices": list("wxyz"), "answer": n % 4} for n in range(1, 12)]


@pytest.fixture(scope="module")
def ours():
    tokenizer = train_tokenizer(["A B C D Multiple Choice question letter"] * 3, 280)
    torch.manual_seed(0)
    model = NanochatForCausalLM(
        NanochatConfig(vocab_size=280, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return model, tokenizer


@pytest.fixture(scope="module")
def recipe(ours, tmp_path_factory):
    """A folder with a model and small data, and a recipe that names them."""
    folder = tmp_path_factory.mktemp("eval")
    export(*ours, folder / "model")
    (folder / "words.txt").write_text("".join(f"{a}{b}{c}\n" for a in "abcdefgh" for b in "aeiou" for c in "klmnp"))
    (folder / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MMLU))
    human = {
        "task_id": "x/0",
        "prompt": "def one():\n    'One.'\n",
        "canonical_solution": "    return 1\n",
        "entry_point": "one",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }
    (folder / "human.jsonl").write_text(json.dumps(human) + "\n")
    lines = ["eval_data:"]
    lines += [
        f"  - {{task: {name}, path: {folder / file}}}"
        for name, file in (("mmlu", "mmlu.jsonl"), ("humaneval", "human.jsonl"))
    ]
    lines += [f"  - {{task: {name}, path: {folder / 'words.txt'}}}" for name in ("spelling_bee", "simple_spelling")]
    (folder / "recipe.yaml").write_text("\n".join(lines) + "\n")
    return folder


def arguments(recipe, output, *others):
    return [
        "--config",
        str(recipe / "recipe.yaml"),
        "--model",
        str(recipe / "model"),
        "--limit",
        "9",
        "--batch-size",
        "2",
        "--max-new-tokens",
        "6",
        "--output",
        str(output),
        *others,
    ]


def test_letters_of_a_batch_are_those_of_each_prompt_alone(ours):
    model, tokenizer = ours
    result = evaluate_task(model, tokenizer, get_task("mmlu"), MMLU, options=ChatOptions(4, progress=False))
    for row, answer in zip(MMLU, result.answers, strict=True):
        prompt = torch.tensor([render_prompt(tokenizer, mmlu(row))])
        ids = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ABCD"]
        best = "ABCD"[int(model(prompt).logits[0, -1, ids].argmax())]
        expected = "ABCD"[row["answer"]]
        assert (answer["answer"], answer["correct"], answer["expected"]) == (best, best == expected, expected)
    assert result.correct == sum(answer["correct"] for answer in result.answers)
    prompts = [render_prompt(tokenizer, mmlu(row)) for row in MMLU]
    together, alone = last_logits(model, prompts, 0), torch.cat([last_logits(model, [prompt], 0) for prompt in prompts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert all((alone[i] - alone[i + 1]).abs().max() > 1e-2 for i in range(10))  # or any mistake would pass


def test_ranks_share_the_batches_and_each_answers_its_own(ours, monkeypatch):
    shares = []
    monkeypatch.setattr(chat, "gather_object", lambda records: shares.append([r["index"] for r in records]) or records)
    for rank in range(3):
        accelerator = SimpleNamespace(num_processes=3, process_index=rank)
        evaluate_task(*ours, get_task("mmlu"), MMLU, accelerator=accelerator, options=ChatOptions(2, progress=False))
    assert sorted(i for share in shares for i in share) == list(range(len(MMLU))) and all(
        len(share) >= 3 for share in shares
    )
    assert length_sorted_batches([[1], [1, 2, 3], [1, 2]], 2) == [[1, 2], [0]]


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_give_the_answers_of_one(world, recipe, tmp_path):
    chat_eval.main(arguments(recipe, tmp_path / "1.json"))
    run = Run("scripts.chat_eval", arguments(recipe, tmp_path / "several.json"), tmp_path / "log", world=world)
    assert run.wait() == [0] * world, run.text()
    one = json.loads((tmp_path / "1.json").read_text())
    several = json.loads((tmp_path / "several.json").read_text())
    assert (one["settings"]["processes"], several["settings"]["processes"]) == (1, world)
    said = run.text()
    assert (
        said.count("| mmlu |") == 1 and said.count("ChatCORE") == 1 and said.count("sandbox: ") == 1
    )  # the main process alone
    assert "of 6 tasks, without arc_easy, arc_challenge, gsm8k, at most 9 questions a task" in said
    assert one["tasks"] == several["tasks"]
    assert [(t["name"], t["total"]) for t in one["tasks"]] == [
        ("mmlu", 9),
        ("humaneval", 1),
        ("spelling_bee", 9),
        ("simple_spelling", 9),
    ]
    assert one["chatcore_of_these_tasks"] == several["chatcore_of_these_tasks"] and "chatcore" not in one
    for task in one["tasks"]:
        assert [a["index"] for a in task["answers"]] == list(range(task["total"]))
        assert all(a.keys() == {"index", "task", "question", "answer", "expected", "correct"} for a in task["answers"])


def test_tasks_of_the_command_line_take_the_paths_of_the_recipe_and_the_table_is_written(recipe, tmp_path, capsys):
    output = tmp_path / "new" / "answers.json"
    chat_eval.main(arguments(recipe, output, "--tasks", "simple_spelling", "--markdown", "true"))
    table = output.with_suffix(".md").read_text()
    assert (
        table in capsys.readouterr().out
        and "ChatCORE" not in table
        and "| simple_spelling | 0.0% | 0.0% | 0 | 9 |" in table
    )
    assert "chatcore_of_these_tasks" not in json.loads(output.read_text())


def other_model(folder, template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "):
    """A GPT-2 of another house, with a byte-level tokenizer that knows nothing of nanochat."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<eos>"])}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.chat_template = template
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=257,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=512,
        bos_token_id=256,
        eos_token_id=256,
        initializer_range=0.5,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def test_any_causal_model_with_a_chat_template(recipe, tmp_path):
    model, tokenizer = other_model(tmp_path / "gpt2")
    argv = arguments(recipe, tmp_path / "a.json", "--tasks", "mmlu,spelling_bee", "--model", str(tmp_path / "gpt2"))
    chat_eval.main(argv)
    lettered, spelled = json.loads((tmp_path / "a.json").read_text())["tasks"]
    for answer in lettered["answers"]:
        ids = tokenizer.encode(f"user: {answer['question']}\nassistant: ", return_tensors="pt")
        letters = model(ids).logits[0, -1, [tokenizer.convert_tokens_to_ids(c) for c in "ABCD"]]
        assert answer["answer"] == "ABCD"[int(letters.argmax())]
    assert all(answer["answer"] for answer in spelled["answers"])


@pytest.mark.parametrize(
    "others, reason",
    [
        (["--model", "nowhere"], "--model nowhere: cannot be loaded"),
        (["--tasks", "gsm8k,juggling"], "task 'juggling' is unknown"),
        (["--limit", "0"], "--limit 0 must be at least 1"),
        (["--dtype", "int8"], "--dtype int8 must be"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(recipe, tmp_path, capsys, others, reason):
    with pytest.raises(SystemExit, match="2"):
        chat_eval.main(arguments(recipe, tmp_path / "a.json", *others))
    assert reason in capsys.readouterr().err.strip().splitlines()[-1]


def test_models_without_a_template_and_rows_without_an_answer_are_refused(ours, tmp_path, capsys):
    with pytest.raises(ValueError, match="has no chat template"):
        evaluate_task(*other_model(tmp_path, template=None), get_task("mmlu"), MMLU, options=QUIET)
    rows = [{"messages": [{"role": "user", "content": "hi"}]}]
    with pytest.raises(ValueError, match="custom_json: row 0 does not end in a question and its answer"):
        evaluate_task(*ours, get_task("custom_json"), rows, options=QUIET)
    with pytest.raises(ValueError, match="no rows"):
        evaluate_task(*ours, get_task("mmlu"), [], options=QUIET)


def test_a_limit_takes_rows_from_everywhere(recipe):
    task, path = get_task("mmlu"), str(recipe / "mmlu.jsonl")
    assert [len(row["question"]) // 4 for row in evaluation_rows(task, path, 4)] == [1, 3, 6, 9]
    assert len(evaluation_rows(task, path)) == len(evaluation_rows(task, path, 99)) == 11
    assert (
        len(evaluation_rows(get_task("calculator"), limit=1200)) == 1200
        and len(evaluation_rows(get_task("calculator"))) == 1000
    )
    with pytest.raises(ValueError, match="limit=0"):
        evaluation_rows(task, path, 0)


def test_chat_core_is_centred_and_its_error_that_of_a_mean():
    results = [(TaskResult("a", 25, 100), 0.25), (TaskResult("b", 50, 100), 0.0)]
    assert chat_core(results) == pytest.approx(0.25)
    assert chat_core_stderr(results) == pytest.approx(((0.0433 / 0.75) ** 2 + 0.05**2) ** 0.5 / 2, rel=1e-3)


def test_a_models_own_code_runs_only_where_it_is_trusted(recipe, tmp_path, capsys):
    folder = tmp_path / "foreign"
    other_model(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "foreign",
        "auto_map": {"AutoConfig": "foreign.ForeignConfig", "AutoModelForCausalLM": "foreign.Foreign"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "foreign.py").write_text(
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "class ForeignConfig(GPT2Config):\n    model_type = 'foreign'\n"
        "class Foreign(GPT2LMHeadModel):\n    config_class = ForeignConfig\n"
    )
    argv = arguments(recipe, tmp_path / "a.json", "--tasks", "mmlu", "--model", str(folder))
    with pytest.raises(SystemExit, match="2"):
        chat_eval.main(argv)
    assert "comes with code of its own; read it, and give --trust-remote-code" in capsys.readouterr().err
    chat_eval.main([*argv, "--trust-remote-code"])
    assert json.loads((tmp_path / "a.json").read_text())["tasks"][0]["total"] == 9
