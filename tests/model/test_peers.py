"""The model with transformers' Trainer, TRL, PEFT and lm_eval. The last three are skipped where not installed."""

import json
import re

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from nanochat_hf.conversation import SPECIAL_TOKENS, render
from nanochat_hf.model import NanochatForCausalLM
from nanochat_hf.tokenizer import train_tokenizer
from tests.support.models import build

TEXT = "The cat sat on the mat, and it counted 12 letters; then the other cat sat there."
CHATS = [
    [{"role": "user", "content": f"count to {n}"}, {"role": "assistant", "content": " ".join(map(str, range(n)))}]
    for n in range(2, 18)
]
QUIET = dict(report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True, per_device_train_batch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model of 300 tokens with its tokenizer."""
    folder = tmp_path_factory.mktemp("peer")
    tokenizer = train_tokenizer([TEXT] * 4, 300)
    ids = {
        name: tokenizer.convert_tokens_to_ids(t)
        for name, t in zip(("bos", "eos", "pad"), SPECIAL_TOKENS[::4], strict=True)
    }
    build(vocab_size=300, max_position_embeddings=64, **{f"{n}_token_id": i for n, i in ids.items()}).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_learns_in_ten_steps_evaluates_and_saves(folder, tmp_path):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), NanochatForCausalLM.from_pretrained(folder)
    rows = Dataset.from_list([{"input_ids": render(tokenizer, {"messages": chat})[0]} for chat in CHATS])
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=10,
        learning_rate=2e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=10,
        gradient_accumulation_steps=2,
        **QUIET,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator)
    before = trainer.evaluate()["eval_loss"]  # there only if Trainer takes our arguments for what they are
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert len(losses(trainer)) == 10 and after < before - 0.5
    assert abs(losses(trainer)[0] - before) < 0.5, "the logged loss is not a mean over tokens"
    trainer.save_model(str(tmp_path / "out"))
    assert type(NanochatForCausalLM.from_pretrained(tmp_path / "out")) is NanochatForCausalLM


@pytest.mark.parametrize("packing", [False, True])
def test_trl_trains_on_the_assistants_tokens_alone(folder, tmp_path, packing):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), NanochatForCausalLM.from_pretrained(folder)
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=10,
        learning_rate=2e-3,
        logging_steps=1,
        assistant_only_loss=True,
        max_length=64,
        packing=packing,
        packing_strategy="wrapped",
        bf16=False,
        **QUIET,
    )
    rows = Dataset.from_list([{"messages": chat} for chat in CHATS])
    model.resize_token_embeddings(
        len(tokenizer)
    )  # TRL computes with every row of the head, so none may be there for padding
    trainer = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    if not packing:
        batch = next(iter(trainer.get_train_dataloader()))
        told = {
            tuple(i for i, mask in zip(*render(tokenizer, {"messages": chat}), strict=True) if mask) for chat in CHATS
        }
        assert {tuple(row[row != -100].tolist()) for row in batch["labels"]} <= told
        own = NanochatForCausalLM.forward(
            model, **{n: batch[n] for n in ("input_ids", "attention_mask", "labels")}
        ).loss
        torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), own, rtol=1e-5, atol=1e-5)
    trainer.train()
    assert len(losses(trainer)) == 10 and losses(trainer)[-1] < losses(trainer)[0] - 0.5


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config"])
def test_peft_knows_its_default_targets(folder, kind):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(
        NanochatForCausalLM.from_pretrained(folder), getattr(peft, kind)(task_type="CAUSAL_LM")
    ).train()
    ids = torch.randint(0, 200, (1, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    adapted = {
        re.split(r"\.lora_|\.ia3_", name)[0].rsplit(".", 1)[-1]
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    assert adapted == ({"q_proj", "v_proj"} if kind == "LoraConfig" else {"k_proj", "v_proj", "down_proj"})


def test_an_adapter_keeps_the_rows_of_new_tokens_in_every_table_that_is_named(folder, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    model = NanochatForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(308)
    with torch.no_grad():
        for table in model.tables():
            table.weight[300:] = torch.randn_like(table.weight[300:])
    tables = ["embed_tokens", "lm_head", *(f"value_embeds.{i}" for i in model.model.value_embeds)]
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", modules_to_save=tables)).eval()
    ids = torch.tensor([[5, 302, 7, 305]])
    expected = adapted(input_ids=ids).logits
    adapted.save_pretrained(tmp_path)
    base = NanochatForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(308)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, expected)


def test_lora_trains_on_weights_that_torchao_has_quantised(folder):
    """The head is still an nn.Linear, and its weight no plain parameter: the loss must go through the layer."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    ids = torch.randint(0, 200, (2, 16))
    base = NanochatForCausalLM.from_pretrained(folder).eval()
    plain = base(input_ids=ids, labels=ids).loss.item()
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    assert type(base.lm_head.weight) is not torch.nn.Parameter
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(plain, rel=0.01) and losses == sorted(losses, reverse=True)


def test_trl_trains_a_reward_model(folder, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    rows = [{"chosen": said("yes"), "rejected": said("no")} for _ in range(6)]
    config = trl.RewardConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to="none", bf16=False
    )
    before = model.score.weight.detach().clone()
    trainer = trl.RewardTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    assert trainer.state.global_step == 3 and not torch.equal(model.score.weight.cpu(), before)


def said(answer):
    return [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": answer}]


def test_peft_attaches_to_the_linear_layers_trains_and_merges(folder, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = NanochatForCausalLM.from_pretrained(folder)
    frozen = {n: p.clone() for n, p in base.named_parameters()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = {
        n.split(".lora_A")[0].rsplit(".", 1)[-1]
        for n, p in model.named_parameters()
        if p.requires_grad and "lora_A" in n
    }
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "ve_gate", "up_proj", "down_proj"}
    ids = torch.arange(10, 42).view(2, 16)
    optimizer, seen = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(10):
        seen.append(model(input_ids=ids, labels=ids).loss)
        seen[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen[-1] < seen[0] - 0.2
    model.eval()
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(NanochatForCausalLM.from_pretrained(folder), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, expected)
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (2, 19)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(p, frozen[n]) for n, p in merged.named_parameters() if "embed" in n or "lambdas" in n)


def test_lm_eval_scores_a_local_task(folder, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval.tasks import TaskManager

    questions = [
        {"q": "The cat sat on", "choices": [" the mat", " 12 letters", " xyz"], "gold": g} for g in (0, 1, 2, 0)
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "cats.yaml").write_text(
        f"task: cats\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path / 'q.jsonl'}}}\ntest_split: train\n"
        "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: choices\ndoc_to_target: gold\n"
        "target_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(
        "hf",
        model_args=f"pretrained={folder},dtype=float32",
        tasks=["cats"],
        task_manager=manager,
        device="cpu",
        batch_size=2,
        log_samples=True,
    )
    model, tokenizer = NanochatForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    context = tokenizer("The cat sat on", add_special_tokens=False)["input_ids"]
    scores = []  # what the formula says
    for choice in questions[0]["choices"]:
        rest = tokenizer(choice, add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([context + rest])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        scores.append(logits.gather(-1, torch.tensor(rest)[:, None]).sum().item())
    best = max(range(3), key=scores.__getitem__)
    assert found["results"]["cats"]["acc,none"] == sum(q["gold"] == best for q in questions) / 4
    logged = [float(r[0]) for r in found["samples"]["cats"][0]["filtered_resps"]]
    assert logged == pytest.approx(scores, abs=1e-3)
