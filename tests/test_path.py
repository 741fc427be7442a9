"""The contracts along the way of the data: rendering, packing, batches, loss, resume, generation, evaluation."""

import json
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.conversation import SPECIAL_TOKENS, ConversationError, render, render_prompt
from nanochat_hf.data.collate import PackingCollator
from nanochat_hf.data.packing import plan_rows
from nanochat_hf.data.planned import SFTBatches
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.data.streamed import TextBatches
from nanochat_hf.evals.bpb import evaluate_bpb
from nanochat_hf.generation import Engine, _Row
from nanochat_hf.interop.folder import export
from nanochat_hf.optim import MuonAdamW, apply_schedule, build_param_groups
from nanochat_hf.tasks import get_task
from nanochat_hf.tokenizer import token_bytes, train_tokenizer
from nanochat_hf.tools.calculator import calculate
from nanochat_hf.training import checkpoint
from nanochat_hf.training.trainer import Trainer
from tests.support.processes import Run

TEXT = [
    "The cat sat on the mat and counted 12 letters.",
    "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich.",
    "naïve café 🙂",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT * 3, 280)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [
        [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} " * (i % 7 + 1)}]
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def tiny(vocab_size=280, depth=2, **settings):
    torch.manual_seed(0)
    config = dict(
        vocab_size=vocab_size,
        hidden_size=64,
        num_hidden_layers=depth,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return NanochatForCausalLM(NanochatConfig(**(config | settings)))


def shaken(**settings):
    """A model whose zero-initialised weights are not zero, so that every path matters."""
    model = tiny(**settings)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


text = st.text(max_size=30).filter(lambda t: not any(s in t for s in SPECIAL_TOKENS))
# transformers marks by character: a part that ends in a character of several tokens loses all but the first of them, so
# parts are ASCII here
ascii_text = st.text(st.characters(max_codepoint=127), max_size=30).filter(
    lambda t: not any(s in t for s in SPECIAL_TOKENS)
)
parts = st.lists(st.tuples(st.sampled_from(["text", "python", "python_output"]), ascii_text), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(user=text, answer=st.one_of(text, parts), system=st.one_of(st.none(), text))
def test_render_equals_the_chat_template(tokenizer, user, answer, system):
    content = answer if isinstance(answer, str) else [{"type": k, "text": t} for k, t in answer]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    ids, mask = render(tokenizer, {"messages": messages})
    said = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert said["input_ids"] == ids and said["assistant_masks"] == mask
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt == render_prompt(tokenizer, {"messages": messages})


def test_special_strings_stay_text_in_render_and_raise_in_the_template(tokenizer):
    messages = [{"role": "user", "content": "<|assistant_end|>"}, {"role": "assistant", "content": "ok"}]
    ids, _ = render(tokenizer, {"messages": messages})
    assert ids.count(tokenizer.eos_token_id) == 1
    with pytest.raises(Exception, match="special token"):
        tokenizer.apply_chat_template(messages)


@given(st.text(max_size=60))
def test_tokenizer_round_trips_and_counts_bytes(tokenizer, text):
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    if not any(s in text for s in SPECIAL_TOKENS):
        assert tokenizer.decode(ids) == text
        assert token_bytes(tokenizer)[ids].sum() == len(text.encode())


def test_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size=200.*at least 265"):
        train_tokenizer(TEXT, 200)


@given(st.lists(st.integers(1, 50), max_size=80))
def test_planned_rows_hold_everything_once(lengths):
    rows = plan_rows(lengths, 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 50 for row in rows)
    assert plan_rows([5, 3, 2], capacity=5) == [[0], [1, 2]]


def test_collator_lays_out_targets_masks_and_positions():
    batch = PackingCollator(5, pad_token_id=9)(
        [[{"ids": [1, 2, 3], "mask": [0, 1, 1]}, {"ids": [1, 4], "mask": [0, 1]}]]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 1, 4]]
    assert batch["shift_labels"].tolist() == [[2, 3, -100, 4, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]


def test_packed_documents_do_not_see_each_other_and_the_future_is_hidden():
    model, ids = shaken(depth=4), torch.randint(280, (1, 40))
    positions = torch.cat((torch.arange(25), torch.arange(15)))[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = model(ids[:, 25:], use_cache=False).logits
    torch.testing.assert_close(packed[:, 25:], alone, rtol=1e-4, atol=1e-5)
    changed = ids.clone()
    changed[:, 30:] = (changed[:, 30:] + 1) % 280
    assert torch.equal(model(changed, position_ids=positions, use_cache=False).logits[:, :30], packed[:, :30])


def test_first_loss_is_ln_v_and_cached_equals_uncached():
    model, ids = tiny(depth=4), torch.randint(280, (2, 60))
    model.train()
    assert model(ids, labels=ids).loss.item() == pytest.approx(torch.tensor(280.0).log().item(), rel=0.01)
    model = shaken(depth=4)
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :40], use_cache=True)
    rest = model(ids[:, 40:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 40:], rtol=1e-4, atol=1e-5)


def test_export_loads_where_the_package_cannot_be_imported(tmp_path, tokenizer):
    model = shaken()
    export(model, tokenizer, tmp_path / "final")
    ids = torch.arange(20)[None]
    code = f"""
import sys; sys.modules['nanochat_hf'] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "final")!r}, trust_remote_code=True)
print(model(torch.arange(20)[None]).logits.double().sum().item())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=None)
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) == pytest.approx(model(ids).logits.double().sum().item(), rel=1e-5)


def digest(batches, count):
    stream = iter(batches)
    return [tuple(next(stream)["input_ids"].flatten().tolist()) for _ in range(count)]


@pytest.mark.parametrize("kind", ["sft", "crop", "keep"])
def test_resumed_batches_equal_uninterrupted_ones(kind, tokenizer, chats, tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"{i} " * (i % 40 + 1)}) + "\n" for i in range(90)))

    def make():
        if kind == "sft":
            return SFTBatches([SourceConfig(path=chats)], tokenizer, rows=2, positions=48)
        return TextBatches(SourceConfig(path=str(tmp_path / "t.jsonl")), tokenizer, rows=2, positions=48, mode=kind)

    whole, first, second = digest(make(), 12), make(), make()
    assert digest(first, 5) == whole[:5]
    second.load_state_dict(first.state_dict())
    assert digest(second, 7) == whole[5:]


def test_an_epoch_holds_every_row_once_over_any_number_of_ranks(tokenizer, chats):
    def rows(world):
        loaders = [
            SFTBatches([SourceConfig(path=chats)], tokenizer, rows=1, positions=48, rank=r, world_size=world)
            for r in range(world)
        ]
        steps = loaders[0].num_rows // world
        return [row for loader in loaders for row in digest(loader, steps)], loaders[0].num_rows

    one, count = rows(1)
    assert len(one) == count
    for world in (2, 3):
        some, _ = rows(world)
        assert len(set(some)) == len(some) and set(some) <= set(one)


def make_trainer(tokenizer, chats, rows, accumulation, steps=6, make=tiny):
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False),
    )
    model = make(vocab_size=len(tokenizer))
    batches = SFTBatches([SourceConfig(path=chats)], tokenizer, rows=rows, positions=48)

    def schedule(optimizer, step):
        apply_schedule(optimizer.optimizer, 1.0, 0.9, 1.0)
        return 1.0

    return Trainer(
        accelerator, model, MuonAdamW(build_param_groups(model)), batches, num_steps=steps, schedule=schedule
    )


def test_a_compiled_model_is_compiled_once_whatever_the_number_of_targets(tokenizer, chats):
    from torch._dynamo.testing import CompileCounter

    counter, targets = CompileCounter(), set()
    trainer = make_trainer(tokenizer, chats, 2, 1, steps=5)
    trainer.model = torch.compile(trainer.model, backend=counter, dynamic=False, fullgraph=True)
    trainer.callbacks = [lambda trainer, info: targets.add(info.targets)]
    trainer.fit()
    assert len(targets) > 2 and counter.frame_count == 1


def test_resumed_training_is_bit_identical(tokenizer, chats, tmp_path):
    whole = make_trainer(tokenizer, chats, 2, 2)
    whole.fit()
    first = make_trainer(tokenizer, chats, 2, 2, steps=3)
    first.fit()
    folder = checkpoint.save(first, tmp_path, tokenizer, {})
    assert checkpoint.newest(tmp_path) == folder
    second = make_trainer(tokenizer, chats, 2, 2)
    checkpoint.load(second, folder)
    second.fit()
    for (name, a), b in zip(whole.raw_model.named_parameters(), second.raw_model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_greedy_engine_equals_generate_alone_and_in_a_batch(tokenizer):
    model = shaken(vocab_size=len(tokenizer))
    prompts = [[1, 5, 9, 12], [3, 4], [7, 8, 9, 10, 11, 12]]
    together = Engine(model, tokenizer, calculator=lambda expression: None).generate(prompts, max_new_tokens=12)
    ends = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    for prompt, (completion,) in zip(prompts, together, strict=True):
        ids = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0,
        )
        expected = [i for i in ids[0, len(prompt) :].tolist() if i not in ends]
        assert completion.ids == expected


def test_tool_output_is_forced_and_marked(tokenizer):
    row, token = _Row(tokenizer, calculate), tokenizer.convert_tokens_to_ids
    for i in [token("<|python_start|>"), *tokenizer.encode("2*21", add_special_tokens=False), token("<|python_end|>")]:
        row.take(i)
    while row.pending:
        row.take(0)
    forced = [i for i, f in zip(row.out.ids, row.out.forced, strict=True) if f]
    assert tokenizer.decode(forced) == "<|output_start|>42<|output_end|>"


@given(st.text(max_size=40))
def test_calculator_never_raises(text):
    assert calculate(text) is None or isinstance(calculate(text), str)


def test_calculator_computes_and_refuses():
    assert [calculate(e) for e in ("12*(3+4)", "'apple'.count('p')", "1/4", "10/2", "+10")] == [
        "84",
        "2",
        "0.25",
        "5",
        "10",
    ]
    for bad in ("2**9", "__import__('os')", "1/0", "9" * 300, "(" * 150, "[1]", "10**10**10", "True+1"):
        assert calculate(bad) is None


def test_bpb_does_not_depend_on_the_geometry(tokenizer):
    model, ids = shaken(vocab_size=len(tokenizer)), torch.randint(270, (4, 33))
    batch = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]}
    values = [
        evaluate_bpb(
            model, [{k: v[i : i + n] for k, v in batch.items()} for i in range(0, 4, n)], token_bytes(tokenizer)
        )
        for n in (1, 2, 4)
    ]
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-6)


def test_grading_right_wrong_and_odd_answers():
    task = get_task("spelling_bee")
    conversation = task.to_conversation({"word": "apple", "letter": "p", "question": "How many {l} in {w}?"})
    assert task.grade(conversation, "so #### 2")
    assert (
        not task.grade(conversation, "#### 3")
        and not task.grade(conversation, "2")
        and not task.grade(conversation, "#### ")
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "line 2: not JSON"),
        ('[{"role": "assistant", "content": "hi"}]', "line 2: turn 1 has role 'assistant'"),
        ('{"a": 1}', "line 2: columns a"),
    ],
)
def test_bad_conversations_name_file_and_line(tmp_path, tokenizer, line, reason):
    good = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises((ConversationError, ValueError), match=f"bad.jsonl {reason}"):
        SFTBatches([SourceConfig(path=str(tmp_path / "bad.jsonl"))], tokenizer, rows=1, positions=32)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["scripts.chat_sft", "--model", "x", "--output-dir", "y", "--nonsense", "1"], "unknown flags: --nonsense"),
        (["scripts.tok_train", "--data", "none.jsonl", "--output", "y"], "none.jsonl: no such file"),
        (["scripts.chat_eval", "--model", "none", "--tasks", "juggling"], "task 'juggling' is unknown"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments, reason, tmp_path):
    run = Run(arguments[0], arguments[1:], tmp_path / "log")
    assert run.wait() == [2] and reason in run.text() and "Traceback" not in run.text()


def test_a_batch_size_that_does_not_divide_says_which_would():
    from nanochat_hf.scaling import accumulation_steps

    with pytest.raises(ValueError, match="100000 must be a multiple of 65536.*try 131072"):
        accumulation_steps(100000, 32, 2048, 1)
    assert accumulation_steps(524288, 32, 2048, 1) == 8
