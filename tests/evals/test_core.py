"""CORE against a plain implementation: every option alone, whole, without a cache, without batches."""

import json
import random
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.cli.base_eval import main
from nanochat_hf.evals.core import CoreTask, centred, common_length, load_bundle, prompts
from nanochat_hf.evals.core_scoring import CoreOptions, Scorer, evaluate_core_task
from nanochat_hf.machine.accelerator import Ranks
from nanochat_hf.tokenizer import train_tokenizer
from nanochat_hf.training.callbacks.core import CoreConfig
from tests.support.processes import Run

QUIET = CoreOptions(progress=False)
BUNDLE = Path("../shared/data/core/eval_bundle.zip")
WORDS = (
    "the cat sat on a mat and counted twelve letters while rain fell over green hills near old stone bridges".split()
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS)] * 3, 300)


def shaken(make):
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def models():
    sizes = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2)
    return {
        "nanochat": shaken(
            lambda: NanochatForCausalLM(NanochatConfig(vocab_size=300, max_position_embeddings=96, **sizes))
        ),
        "gpt2": shaken(
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=96))
        ),
    }


def some(rng, least, most):
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def make_task(kind, shots, count=24, longest=8):
    rng, items = random.Random(kind), []
    for _ in range(count):
        options = [some(rng, 1, 4) for _ in range(rng.randint(2, 5))]
        options += [options[0] + " mat"]  # an option that another one begins with
        if kind == "multiple_choice":
            items.append({"query": some(rng, 2, longest), "choices": options, "gold": rng.randrange(len(options))})
        elif kind == "schema":
            head = some(rng, 1, longest)
            contexts = [f"{head} {o}" for o in options]
            items.append(
                {"context_options": contexts, "continuation": some(rng, 2, 5), "gold": rng.randrange(len(options))}
            )
        else:
            items.append({"context": some(rng, 2, longest) + " ", "continuation": some(rng, 1, 2)})
    return CoreTask("made", kind, items, shots, "\nAnswer: " if shots else " ", 0.25)


def plain_right(model, tokenizer, task, items, index):
    """One item the long way, written from the description alone."""
    shots = random.Random(1234 + index).sample([i for i in range(len(items)) if i != index], task.num_fewshot)
    head, item, d = "", items[index], task.delimiter
    for shot in (items[i] for i in shots):
        if task.kind == "multiple_choice":
            head += shot["query"] + d + shot["choices"][shot["gold"]] + "\n\n"
        elif task.kind == "schema":
            head += shot["context_options"][shot["gold"]] + d + shot["continuation"] + "\n\n"
        else:
            head += shot["context"].strip() + d + shot["continuation"] + "\n\n"
    if task.kind == "multiple_choice":
        texts = [head + item["query"] + d + c for c in item["choices"]]
    elif task.kind == "schema":
        texts = [head + c + d + item["continuation"] for c in item["context_options"]]
    else:
        texts = [
            (head + item["context"].strip() + d).strip(),
            head + item["context"].strip() + d + item["continuation"],
        ]
    ids = [[tokenizer.bos_token_id, *tokenizer.encode(t, add_special_tokens=False)] for t in texts]
    same = 0
    flip = [i[::-1] for i in ids] if task.kind == "schema" else ids
    while all(len(i) > same for i in flip) and len({i[same] for i in flip}) == 1:
        same += 1
    starts = [len(i) - same for i in ids] if task.kind == "schema" else [same] * len(ids)
    if task.kind == "language_modeling":
        ids, starts = ids[1:], starts[1:]
    losses, room = [], model.config.max_position_embeddings
    for one, start in zip(ids, starts, strict=True):
        cut = max(0, len(one) - room)
        one, start = one[cut:], max(1, min(start, len(one) - 1) - cut)
        with torch.no_grad():
            logits = model(torch.tensor([one])).logits[0].float()
        if task.kind == "language_modeling":
            return logits[start - 1 : -1].argmax(-1).tolist() == one[start:]
        losses.append(F.cross_entropy(logits[start - 1 : -1], torch.tensor(one[start:])).item())
    return losses.index(min(losses)) == item["gold"]


@pytest.mark.parametrize("shots", [0, 3, 10])  # 10 shots are longer than the model's 96 positions, so the left is cut
@pytest.mark.parametrize("kind", ["multiple_choice", "schema", "language_modeling"])
@pytest.mark.parametrize("name", ["nanochat", "gpt2"])
def test_batched_decisions_are_those_of_the_plain_way(models, tokenizer, name, kind, shots):
    model, task = models[name], make_task(kind, shots)
    assert Scorer(model).can_share(), "options of one item run their common beginning once"
    items = task.chosen()
    assert (max(len(tokenizer.encode(t)) for i in range(len(items)) for t in prompts(task, items, i)) > 96) == (
        shots == 10
    ) or shots == 3
    expected = [float(plain_right(model, tokenizer, task, items, i)) for i in range(len(items))]
    for budget in (1, 512, 8192):
        options = CoreOptions(batch_tokens=budget, progress=False)
        assert evaluate_core_task(model, tokenizer, task, options=options).tolist() == expected
    if kind != "language_modeling":
        assert 0 < sum(expected) < len(items)
    parts = [evaluate_core_task(model, tokenizer, task, options=QUIET, ranks=Ranks(r, 3)) for r in range(3)]
    assert sum(parts).tolist() == expected


def test_language_modeling_is_right_where_the_greedy_continuation_is_the_answer(models, tokenizer):
    model, items = models["nanochat"], []
    for item in make_task("language_modeling", 0).items:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(item["context"].strip(), add_special_tokens=False)]
        text = tokenizer.decode(model.generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False)[0, len(ids) :])
        if "<|" not in text:  # a continuation of a data set holds no special tokens
            items.append({"context": item["context"], "continuation": text})
    task = CoreTask("greedy", "language_modeling", items, 0, "")
    expected = [float(plain_right(model, tokenizer, task, task.chosen(), i)) for i in range(len(items))]
    assert evaluate_core_task(model, tokenizer, task, options=QUIET).tolist() == expected and sum(expected) > 0


def test_texts_tokens_and_centring_by_example(tokenizer):
    item = {"query": "1+1=", "choices": ["2", "3"], "gold": 0}
    assert prompts(CoreTask("t", "multiple_choice", []), [item], 0) == ["1+1= 2", "1+1= 3"]
    two = CoreTask("t", "multiple_choice", [], 1, " ")
    assert prompts(two, [item, {"query": "2+2=", "choices": ["5", "4"], "gold": 1}], 0)[0] == "2+2= 4\n\n1+1= 2"
    assert common_length([[1, 2, 3], [1, 2, 4]]) == 2 and common_length([[1, 9, 4], [2, 9, 4], [9, 4]], end=True) == 2
    assert centred(0.625, 0.25) == 0.5
    with pytest.raises(ValueError, match="num_fewshot=1"):
        prompts(two, [item], 0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "bundle.zip"
    entries = [
        {"label": label, "dataset_uri": f"x/{label}.jsonl", "num_fewshot": [2], "icl_task_type": kind}
        for label, kind in (("here", "multiple_choice"), ("gone", "multiple_choice"), ("twins", "schema"))
    ]
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("b/core.yaml", json.dumps({"icl_tasks": entries}))
        file.writestr("b/eval_meta_data.csv", "Eval Task,Random baseline\nhere,25\ngone,0\ntwins,50\n")
        for label, kind in (("here", "multiple_choice"), ("twins", "schema")):
            file.writestr(
                f"b/eval_data/x/{label}.jsonl", "".join(json.dumps(i) + "\n" for i in make_task(kind, 2, 9).items)
            )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, models, tokenizer):
    path = tmp_path_factory.mktemp("models") / "model"
    models["nanochat"].save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path.parent / "texts.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(WORDS[i:])}) + "\n" for i in range(9))
    )
    return path


def test_missing_data_is_listed_and_core_named_partial(tmp_path, folder, bundle, capsys):
    results = main(
        [
            "--model",
            str(folder),
            "--core-data",
            str(bundle),
            "--eval",
            "core,sample",
            "--output",
            str(tmp_path / "out.json"),
        ]
    )
    out = capsys.readouterr().out
    assert "no data file: gone" in out and "CORE (partial, 2 of 3)" in out and "The capital of France is|" in out
    assert json.loads((tmp_path / "out.json").read_text()) == results and results["core"]["missing"] == ["gone"]
    here, twins = results["core"]["tasks"]
    assert here["centred"] == pytest.approx((here["accuracy"] - 0.25) / 0.75)
    assert results["core"]["core"] == pytest.approx((here["centred"] + twins["centred"]) / 2)
    assert (tmp_path / "out.csv").read_text().splitlines()[0] == "task,kind,shots,items,accuracy,baseline,centred"


def test_two_processes_give_the_numbers_of_one(tmp_path, folder, bundle):
    run = [
        "--model",
        str(folder),
        "--core-data",
        str(bundle),
        "--data",
        str(folder.parent / "texts.jsonl"),
        "--eval",
        "core,bpb",
    ]
    one = main([*run, "--output", str(tmp_path / "one.json")])
    two = Run("scripts.base_eval", [*run, "--output", tmp_path / "two.json"], tmp_path / "log", world=2)
    assert two.wait() == [0, 0], two.text()
    assert two.text().count("bits per byte:") == two.text().count("CORE (partial") == 1, "one rank speaks"
    results = json.loads((tmp_path / "two.json").read_text())
    assert results["core"] == one["core"] and results["bpb"] == pytest.approx(one["bpb"], rel=1e-6)


def test_base_training_evaluates_core_on_its_cadence_and_at_the_end(tmp_path, folder, bundle):
    data = [
        "--data",
        folder.parent / "texts.jsonl",
        "--tokenizer",
        folder,
        "--output-dir",
        tmp_path / "base",
        "--depth",
        1,
    ]
    sizes = ["--max-seq-len", 32, "--device-batch-size", 2, "--num-steps", 3, "--eval-every", 0, "--eval-batches", 1]
    run = Run(
        "scripts.base_train",
        [*data, *sizes, "--core-every", 2, "--core-data", bundle, "--core-max-per-task", 5],
        tmp_path / "log",
    )
    assert run.wait() == [0], run.text()
    entries = [
        e for e in map(json.loads, (tmp_path / "base" / "metrics.jsonl").read_text().splitlines()) if "core/core" in e
    ]
    assert [e["step"] for e in entries] == [2, 3] and run.text().count("CORE (partial, 2 of 3)") == 2
    for entry in entries:
        assert entry["core/core"] == pytest.approx((entry["core/here"] + entry["core/twins"]) / 2)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [(dict(core_every=5), "needs --core-data: the evaluation bundle"), (dict(core_every=-1), "--core-every -1")],
)
def test_wrong_settings_of_the_callback_are_named(settings, reason):
    with pytest.raises(ValueError, match=reason):
        CoreConfig(**settings)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (None, "no such file or folder; give the evaluation bundle"),
        ({"a": "b"}, "holds no core.yaml"),
        ({"core.yaml": "icl_tasks: 3"}, "not as expected"),
        (
            {"core.yaml": "icl_tasks: [{label: x, dataset_uri: x, icl_task_type: schema, num_fewshot: [0]}]"},
            "no random baseline",
        ),
    ],
)
def test_what_is_no_bundle_is_named_and_where_to_get_one(tmp_path, files, reason):
    path = tmp_path / "bundle"
    for name, text in (files or {}).items():
        path.mkdir(exist_ok=True)
        (path / name).write_text(text)
    with pytest.raises(ValueError, match=reason):
        load_bundle(path)
    with pytest.raises(ValueError, match=r"https://.*eval_bundle.zip"):
        load_bundle(tmp_path / "none")


def test_too_few_items_for_the_solved_examples_are_said_before_anything_runs(tmp_path, folder, bundle, capsys):
    assert load_bundle(bundle, 3)[1] == ["gone"]
    with pytest.raises(ValueError, match="CORE task here: 2 items are too few for num_fewshot=2; allow at least 3"):
        load_bundle(bundle, 2)
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "--model",
                str(tmp_path / "never loaded"),
                "--core-data",
                str(bundle),
                "--eval",
                "core",
                "--max-per-task",
                "2",
            ]
        )
    assert stop.value.code == 2 and "allow at least 3 items a task" in capsys.readouterr().err
    with pytest.raises(ValueError, match="too few"):  # of base training, whose first CORE may be hours away
        CoreConfig(core_every=1, core_data=str(bundle), core_max_per_task=2).callbacks(None, None)


def test_prefixes_are_shared_exactly_where_the_model_allows_it():
    sizes = dict(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
    )
    made = {
        "llama": LlamaForCausalLM(LlamaConfig(**sizes)),
        "gemma2": Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=16, sliding_window=4, final_logit_softcapping=3.0)),
        "mistral": MistralForCausalLM(MistralConfig(**sizes, sliding_window=4)),
        "alibi": BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=2)),
    }
    for name, model in made.items():
        torch.manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.2)
        scorer = Scorer(model.eval())
        assert scorer.head is not None, name
        assert scorer.can_share() == (name != "alibi"), name
        ids = torch.arange(40)[None] + 7
        torch.testing.assert_close(scorer.logits(scorer.states(ids)), model(ids).logits.float())


def test_real_bundle_loads_whole_and_scores_like_the_plain_way(models, tokenizer):
    if not BUNDLE.exists():
        pytest.skip(f"no CORE bundle at {BUNDLE}")
    tasks, missing = load_bundle(BUNDLE)
    assert len(tasks) + len(missing) == 22 and sorted(missing) == ["boolq", "coqa", "jeopardy", "squad", "winograd"]
    by_label = {task.label: task for task in tasks}
    assert (
        by_label["arc_easy"].baseline == 0.25
        and by_label["piqa"].delimiter == "\nAnswer: "
        and by_label["copa"].num_fewshot == 0
    )
    for label in ("winogrande", "copa", "lambada_openai"):
        task = by_label[label]
        items = task.chosen(6)
        expected = [float(plain_right(models["nanochat"], tokenizer, task, items, i)) for i in range(6)]
        options = CoreOptions(limit=6, progress=False)
        assert evaluate_core_task(models["nanochat"], tokenizer, task, options=options).tolist() == expected
