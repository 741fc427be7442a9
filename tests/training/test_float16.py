"""float16 with a loss scaler.

Muon and AdamW see unscaled gradients, an overflow changes nothing, and training goes on as in float32.

Accelerate makes a scaler on GPUs only; here torch's CPU scaler is put in its place, so that the same path runs. Where
there is a GPU, the script itself is tried as well.
"""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.optim import MuonAdamW, apply_schedule, build_param_groups
from nanochat_hf.training.trainer import Trainer


@pytest.fixture(autouse=True)
def fresh_state():
    """The precision is a setting of the process, which no other test should inherit."""
    yield
    AcceleratorState._reset_state(True)


class Rows:
    """Endless micro-batches of random tokens in two documents each."""

    epoch = 0

    def __iter__(self):
        generator = torch.Generator().manual_seed(1)
        while True:
            ids = torch.randint(280, (2, 33), generator=generator)
            places = torch.cat((torch.arange(20), torch.arange(12))).expand(2, -1)
            yield {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:], "position_ids": places}


class Again(Rows):
    """The first of them at every step."""

    def __iter__(self):
        first = next(super().__iter__())
        while True:
            yield first


class Seen(MuonAdamW):
    """MuonAdamW that notes the norm of the whole gradient at each step."""

    def step(self, closure=None):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        self.__dict__.setdefault("norms", []).append(torch.nn.utils.get_total_norm(grads).item())
        return super().step(closure)


def trained(steps, *, scale=None, max_grad_norm=None, watch=None):
    """A trainer after `steps` of two micro-batches, in float16 with a scaler that begins at `scale`, or in float32."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="fp16" if scale else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False),
    )
    if scale:
        accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=scale), True
    torch.manual_seed(0)
    config = NanochatConfig(
        vocab_size=280, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64
    )
    model = NanochatForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # nothing is zero, so that every path has a gradient
            parameter.add_(torch.randn_like(parameter) * 0.1)

    def schedule(optimizer, step):
        apply_schedule(optimizer.optimizer, 0.1, 0.9)
        return 0.1

    optimizer = Seen(build_param_groups(model), orthogonalize_dtype=torch.float32)
    trainer = Trainer(
        accelerator,
        model,
        optimizer,
        Rows(),
        num_steps=steps,
        schedule=schedule,
        max_grad_norm=max_grad_norm,
        norms_every=1,
        callbacks=[watch] if watch else [],
    )
    trainer.fit()
    return trainer


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_gradients_are_unscaled_before_they_are_measured_clipped_and_used(max_grad_norm):
    seen = {}
    runs = [
        trained(
            3,
            scale=scale,
            max_grad_norm=max_grad_norm,
            watch=lambda trainer, info, key=scale: seen.setdefault(key, []).append(info),
        )
        for scale in (None, 2.0**14)
    ]
    for ours, expected in zip(seen[2.0**14], seen[None], strict=True):
        assert ours.loss.item() == pytest.approx(expected.loss.item(), rel=1e-3)
        for name, norm in expected.grad_norms.items():
            assert ours.grad_norms[name].item() == pytest.approx(norm.item(), rel=0.1), (
                name
            )  # rounding; a scale left in would be a factor
    stepped = [
        run.optimizer.optimizer.norms for run in runs
    ]  # the update hardly depends on the gradient's size, so look at the gradient
    assert stepped[1] == pytest.approx(stepped[0], rel=1e-2) and (
        max_grad_norm is None or max(stepped[1]) <= 0.5 + 1e-4
    )
    for (name, ours), expected in zip(
        runs[1].raw_model.named_parameters(), runs[0].raw_model.parameters(), strict=True
    ):
        assert (ours - expected).norm() <= 5e-2 * expected.norm(), name
    assert runs[1].state.overflowed == 0


def test_an_overflow_changes_nothing_and_the_scale_falls_until_it_fits():
    before = {n: p.clone() for n, p in trained(0, scale=1.0).raw_model.named_parameters()}
    scales = []

    def watch(trainer, info):
        scales.append(trainer.accelerator.scaler.get_scale())
        same = all(torch.equal(p, before[n]) for n, p in trainer.raw_model.named_parameters())
        assert same == (trainer.state.overflowed == info.step)  # nothing moves until a step fits
        assert trainer.state.overflowing == (info.step if same else 0)

    trainer = trained(24, scale=2.0**34, watch=watch)
    assert 0 < trainer.state.overflowed < 24 and scales[0] == 2.0**33
    assert trainer.optimizer.optimizer.skipped_steps == 0  # the optimizer never saw an infinite gradient
    assert all(p.isfinite().all() for p in trainer.raw_model.parameters())


def test_float16_on_the_cpu_is_refused(monkeypatch):
    from nanochat_hf.machine.accelerator import build_accelerator

    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    with pytest.raises(ValueError, match="float16 needs a GPU"):
        build_accelerator(1, dtype="float16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, on which Accelerate makes the scaler")
def test_float16_trains_on_the_gpu(tmp_path):
    from nanochat_hf.machine.accelerator import build_accelerator

    AcceleratorState._reset_state(True)
    accelerator = build_accelerator(2, dtype="float16")
    model = NanochatForCausalLM(
        NanochatConfig(
            vocab_size=280, hidden_size=256, num_hidden_layers=4, num_attention_heads=2, max_position_embeddings=64
        )
    )

    def schedule(optimizer, step):
        apply_schedule(optimizer.optimizer, 1.0, 0.9)
        return 1.0

    losses = []
    trainer = Trainer(
        accelerator,
        model,
        MuonAdamW(build_param_groups(model)),
        Again(),
        num_steps=30,
        schedule=schedule,
        norms_every=1,
        callbacks=[lambda trainer, info: losses.append(info.loss.item())],
    )
    trainer.fit()
    assert trainer.state.overflowed <= 5 and trainer.optimizer.optimizer.skipped_steps == 0, trainer.state
    assert losses[-1] < losses[0] - 1  # the same rows at each step, which a model soon knows
