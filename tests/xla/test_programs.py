"""What XLA compiles and when: nothing after the warm-up, nothing outside XLA, bfloat16 where it should be."""

import re
import sys

import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as metrics
from accelerate import Accelerator
from torch.utils.data import DataLoader

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.data.collate import PackingCollator
from nanochat_hf.machine import xla
from nanochat_hf.machine.accelerator import build_accelerator
from nanochat_hf.machine.attention import choose_attention
from nanochat_hf.machine.xla import packed_masks
from nanochat_hf.optim import MuonAdamW, OptimizerConfig, build_param_groups
from nanochat_hf.optim.muon import orthogonalize
from nanochat_hf.tokenizer import load_tokenizer
from nanochat_hf.training import checkpoint
from nanochat_hf.training.stopping import StopSignal
from nanochat_hf.training.trainer import Trainer
from tests.xla.conftest import flags, run

CONFIG = dict(
    vocab_size=128,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    pad_token_id=0,
)


def counted():
    """(programs compiled, transfers from the device, operations outside XLA) until now."""
    fallbacks = {name: metrics.counter_value(name) for name in metrics.counter_names() if name.startswith("aten::")}
    transfers = metrics.metric_data("TransferFromDeviceTime")
    return metrics.counter_value("UncachedCompile") or 0, transfers[0] if transfers else 0, fallbacks


def small_model(dtype="bfloat16", **changed):
    """An Accelerator, a model on its device's way there, and its optimizer."""
    accelerator = build_accelerator(2, dtype=dtype)
    model = NanochatForCausalLM(NanochatConfig(**CONFIG | changed))
    return accelerator, model, MuonAdamW(build_param_groups(model, OptimizerConfig()))


def rows(count, start=0):
    """Rows of two documents each, whose lengths differ from row to row."""
    generator = torch.Generator().manual_seed(start)
    lengths = torch.randint(3, 17, (count, 2), generator=generator).tolist()
    return [[{"ids": torch.randint(1, 128, (n,), generator=generator).tolist()} for n in pair] for pair in lengths]


def batches(rows_each=2):
    start = 0
    while True:
        yield PackingCollator(32, pad_token_id=0)(rows(rows_each, start))
        start += 1


def test_nothing_compiles_after_the_warm_up(data, sft_flags, monkeypatch, tmp_path):
    """30 steps with accumulation, and evaluation and logging every 5: from step 10 on no program is new."""
    from nanochat_hf.cli import chat_sft

    before, after, step = {}, {}, Trainer.step

    def observed(self, micro_batches):
        before[self.state.step + 1] = counted()
        info = step(self, micro_batches)
        after[info.step] = counted()
        return info

    monkeypatch.setattr(Trainer, "step", observed)
    arguments = sft_flags + flags(
        output_dir=tmp_path, num_steps=30, log_every=5, eval_every=5, save_every=0, warmdown_ratio=0.5, matrix_lr=0.01
    )
    monkeypatch.setattr(sys, "argv", ["chat_sft", *arguments])
    with pytest.raises(SystemExit) as ended:
        chat_sft.main()
    assert ended.value.code == 0
    assert len(after) == 30 and before[1][0] < after[10][0], "the counter counts"
    # before a step: evaluation and logging of the last one lie between
    assert {count for number in range(11, 31) for count, _, _ in (before[number], after[number])} == {after[10][0]}
    for number in range(1, 31):  # from the first step on: no value is asked of the device, no operation leaves XLA
        assert after[number][1:] == before[number][1:], f"step {number}"


def test_accumulation_may_change_without_compiling():
    accelerator, model, optimizer = small_model()

    def schedule(optimizer, step):
        for group in optimizer.param_groups:
            group["lr"], group["momentum"] = group["initial_lr"] / (step + 2), 0.85 + 0.001 * step
        return 1.0

    trainer = Trainer(accelerator, model, optimizer, batches(), num_steps=10, schedule=schedule)
    trainer.fit()
    warm = counted()[0]
    accelerator.gradient_state.plugin_kwargs["num_steps"] = trainer.accumulation = 3
    accelerator.step = 0  # micro-batches count from here
    assert accelerator.gradient_accumulation_steps == 3
    trainer.num_steps = 30
    assert trainer.fit().step == 30
    assert counted()[0] == warm
    assert trainer.optimizer.optimizer.skipped_steps == 0
    assert {p.dtype for p in model.parameters()} == {torch.float32} and {p.device.type for p in model.parameters()} == {
        "xla"
    }


def test_counts_and_the_stop_are_reduced_on_the_device(monkeypatch):
    """As on two replicas, though there is one: the values stay on the device, and the stop comes a step later."""
    accelerator, model, optimizer = small_model()
    trainer = Trainer(accelerator, model, optimizer, batches(), num_steps=1, schedule=lambda *_: 1.0)
    stop = StopSignal(accelerator)
    taken = [next(batches()), next(batches())]
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    transfers = counted()[1]
    targets = trainer._valid_targets(taken)
    assert targets.device.type == "xla" and targets.shape == () and counted()[1] == transfers
    assert int(targets) == sum(int((b["shift_labels"] != -100).sum()) for b in taken)
    assert int(trainer._valid_targets([{"shift_labels": torch.full((1, 4), -100)}])) == 1
    assert not stop.agreed()
    stop.received = 15
    assert [stop.agreed(), stop.agreed()] == [False, True]
    monkeypatch.undo()
    assert stop.agreed()


def test_autocast_and_muon_multiply_in_bfloat16():
    accelerator, model, optimizer = small_model()
    trainer = Trainer(accelerator, model, optimizer, [], num_steps=1, schedule=lambda *_: 1.0)
    batch = {key: value.to(accelerator.device) for key, value in next(batches()).items()}
    text = torch_xla._XLAC._get_xla_tensors_hlo([trainer.model(**batch).loss])
    products = [line for line in text.splitlines() if " dot(" in line]
    assert products and all("= bf16[" in line for line in products)
    matrices = torch.randn(3, 8, 16, device=accelerator.device)
    products = [
        line for line in torch_xla._XLAC._get_xla_tensors_hlo([orthogonalize(matrices)]).splitlines() if " dot(" in line
    ]
    assert len(products) == 15 and all("= bf16[" in line for line in products)
    torch_xla.sync()


@pytest.mark.parametrize("variable", ["XLA_USE_BF16", "XLA_DOWNCAST_BF16"])
def test_refuses_what_rounds_the_master_weights(variable, monkeypatch):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ValueError, match=variable):
        build_accelerator(1)
    monkeypatch.setenv(variable, "0")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="mixed_precision=bf16"):
        build_accelerator(1)


def test_refuses_float16_and_compile():
    with pytest.raises(ValueError, match="float16"):
        build_accelerator(1, dtype="float16")
    with pytest.raises(ValueError, match="compile"):
        build_accelerator(1, compile=True)


def test_masks_are_those_of_transformers():
    """Packed rows with windows: the model's own way on the CPU, the fixed masks on the device."""
    torch.manual_seed(0)
    accelerator, model, _ = small_model("float32")
    model.eval()
    batch = next(batches(4))
    expected = model(**batch, use_cache=False).logits
    masks = packed_masks(model.config, batch["position_ids"])
    assert not torch.equal(masks["full_attention"], masks["sliding_attention"]) and masks["full_attention"].shape == (
        4,
        1,
        32,
        32,
    )
    torch.testing.assert_close(model(**batch, attention_mask=masks, use_cache=False).logits, expected)
    prepared = accelerator.prepare(model)
    ours = prepared(**{key: value.to(accelerator.device) for key, value in batch.items()}, use_cache=False).logits
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_the_flash_kernel_gets_documents_as_segments(monkeypatch):
    """The kernel needs a TPU; a stand-in with its documented meaning takes its place, and the result is SDPA's."""
    from torch_xla.experimental import custom_kernel

    calls = []

    def stand_in(q, k, v, causal=False, q_segment_ids=None, kv_segment_ids=None, sm_scale=1.0):
        calls.append((q.shape, k.shape, q_segment_ids.dtype, causal))
        seen = (q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]).unsqueeze(1) & torch.ones(
            q.shape[2], q.shape[2], dtype=torch.bool
        ).tril()
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=sm_scale)

    monkeypatch.setattr(custom_kernel, "flash_attention", stand_in)
    monkeypatch.setattr(xla, "is_torch_xla_available", lambda check_is_tpu=False: True)
    monkeypatch.setattr(xla, "find_spec", lambda name: True)
    model = NanochatForCausalLM(
        NanochatConfig(**CONFIG | dict(max_position_embeddings=128, num_key_value_heads=1))
    ).eval()
    generator = torch.Generator().manual_seed(1)
    packed = [
        [{"ids": torch.randint(1, 128, (n,), generator=generator).tolist()} for n in (50, 30, 40)] for _ in range(2)
    ]
    batch = PackingCollator(128, pad_token_id=0)(packed)
    expected = model(**batch, use_cache=False).logits
    assert choose_attention(torch.device("xla"))[0] == "pallas"
    model.set_attn_implementation("pallas")
    masks = packed_masks(model.config, batch["position_ids"])
    torch.testing.assert_close(
        model(**batch, attention_mask=masks, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4
    )
    assert calls == [((2, 2, 128, 32), (2, 2, 128, 32), torch.int32, True)], (
        "the layer without a window, and that alone"
    )


def test_attention_without_a_tpu():
    assert choose_attention(torch.device("xla")) == ("sdpa", "no TPU")
    with pytest.raises(ValueError, match="pallas cannot run on xla"):
        choose_attention(torch.device("xla"), "pallas")


@pytest.mark.parametrize("prepared", [True, False])
def test_saves_with_prepared_and_unprepared_loaders(prepared, data, tmp_path):
    accelerator, model, optimizer = small_model("float32")
    loader = DataLoader(rows(24), batch_size=2, collate_fn=PackingCollator(32, pad_token_id=0))
    trainer = Trainer(
        accelerator,
        model,
        optimizer,
        accelerator.prepare(loader) if prepared else loader,
        num_steps=2,
        schedule=lambda *_: 1.0,
    )
    trainer.fit()
    folder = checkpoint.save(trainer, tmp_path, load_tokenizer(data / "tokenizer"), {})
    saved = {name: value.cpu() for name, value in model.state_dict().items()}
    _, other, optimizer = small_model("float32")
    again = Trainer(accelerator, other, optimizer, loader, num_steps=3, schedule=lambda *_: 1.0)
    checkpoint.load(again, folder)
    assert again.state.step == 2
    assert all(torch.equal(value.cpu(), saved[name]) for name, value in other.state_dict().items())
    assert again.fit().step == 3


CHECKPOINTED = """
import os, sys
os.environ["XLA_FLAGS"] += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
os.environ["XLA_FLAGS"] += f" --xla_dump_to={sys.argv[2]} --xla_dump_hlo_as_text"
import torch
from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.machine.accelerator import build_accelerator
from nanochat_hf.machine import xla
from nanochat_hf.machine.xla import enable_checkpointing, mark_step
torch.manual_seed(0)
accelerator = build_accelerator(1, dtype="float32")
sizes = dict(vocab_size=64, hidden_size=64, num_hidden_layers=6, num_attention_heads=2, max_position_embeddings=128)
model = NanochatForCausalLM(NanochatConfig(**sizes))
if sys.argv[1] == "checkpointed":
    enable_checkpointing(model, accelerator.device)
model = accelerator.prepare(model).train()
ids = torch.randint(0, 64, (8, 128)).to(accelerator.device)
mark_step(accelerator.device)
positions = torch.arange(128).expand(8, 128).contiguous().to(accelerator.device)
model(input_ids=ids, shift_labels=ids, position_ids=positions).loss.backward()
mark_step(accelerator.device)
torch.save({name: p.grad.cpu() for name, p in model.named_parameters()}, sys.argv[2] + "/gradients.pt")
"""


def test_gradient_checkpointing_takes_less_memory_for_the_same_gradients(tmp_path):
    """XLA's own report of the memory of the largest program, with the scheduler that minimises it."""
    used, gradients = {}, {}
    for way in ("kept", "checkpointed"):
        (tmp_path / way).mkdir()
        run("-c", CHECKPOINTED, way, tmp_path / way)
        reports = [path.read_text() for path in (tmp_path / way).glob("*memory-usage-report.txt")]
        used[way] = max(int(number) for text in reports for number in re.findall(r"Total bytes used: (\d+)", text))
        gradients[way] = torch.load(tmp_path / way / "gradients.pt")
    assert used["checkpointed"] < 0.9 * used["kept"], used
    for name, value in gradients["kept"].items():
        torch.testing.assert_close(gradients["checkpointed"][name], value, rtol=1e-4, atol=1e-6)
