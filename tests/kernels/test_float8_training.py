"""Models trained by float8 products: gradients, what evaluation and files see of it, which layers take part, how it is chosen. See test_float8.py."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState

from nanochat_hf import NanochatConfig, NanochatForCausalLM, kernels
from nanochat_hf.kernels import float8
from nanochat_hf.kernels.float8 import layers as float8_layers
from nanochat_hf.machine.accelerator import build_accelerator, chose_float8
from nanochat_hf.machine.xla import enable_checkpointing
from nanochat_hf.optim import MuonAdamW, build_param_groups
from nanochat_hf.training.config import TrainConfig
from nanochat_hf.training.equipment import accelerate, install_kernels
from tests.support.kernels import FLOAT8_DEVICES as DEVICES
from tests.support.kernels import relative

FORMULAS = dict(
    rms_norm_eps=1e-6, final_logit_softcapping=50.0
)  # settings which the other kernels do not know, so that no Triton is needed
IDS = 256


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    AcceleratorState._reset_state(True)


def with_float8(model, monkeypatch):
    """Give `model` its operations in float8, on the CPU too, whose torch._scaled_mm multiplies float8 as well; → the report."""
    if model.device.type == "cpu":
        monkeypatch.setattr(float8, "capable", lambda device: (True, ""))
    model.model.training_ops, report = kernels.choose(model, model.device, kernels.FLOAT8)
    return {op: name for op, (name, _) in report.items() if name.startswith("float8")}


def tiny(device="cpu", random=True, **settings):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=IDS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model = NanochatForCausalLM(NanochatConfig(**sizes | settings)).to(device).train()
    for parameter in model.parameters() if random else ():  # at their zero initialisation most paths carry no gradient
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def batch(device="cpu", positions=32):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(IDS, (2, positions + 1), generator=generator).to(device)
    return dict(input_ids=ids[:, :-1], shift_labels=ids[:, 1:])


def gradients(model, inputs, call=None):
    model.zero_grad()
    loss = (model if call is None else call)(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", [FORMULAS, {}], ids=["formulas", "kernels"])
@pytest.mark.parametrize("compile", [False, True])
def test_all_of_a_model_has_a_gradient_near_float32s(settings, compile, device, monkeypatch):
    model, inputs = tiny(device, **settings), batch(device)
    loss, exact = gradients(model, inputs)
    with_float8(model, monkeypatch)
    backend = "inductor" if device == "cuda" else "aot_eager"
    call = torch.compile(model, fullgraph=True, dynamic=False, backend=backend) if compile else None
    with torch.autocast(device, torch.bfloat16):
        float8_loss, found = gradients(model, inputs, call)
    assert 0 < abs(float8_loss - loss) < 0.02 * loss
    for name, grad in found.items():
        assert grad.dtype == torch.float32 and grad.isfinite().all() and grad.any(), name
        if grad.ndim == 2:  # those of the scalars are small differences of large sums
            assert F.cosine_similarity(grad.flatten(), exact[name].flatten(), dim=0) > 0.95, name


@pytest.mark.parametrize("device", DEVICES)
def test_evaluation_is_the_plain_model_to_the_bit(device, monkeypatch):
    model, inputs = tiny(device, **FORMULAS), batch(device)
    twin = deepcopy(model).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with_float8(model, monkeypatch)
    gradients(model, inputs)  # as in a training under way
    model.eval()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        ours, plain = (each(inputs["input_ids"]).logits for each in (model, twin))
    assert torch.equal(ours, plain)
    assert torch.equal(
        *(each.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False) for each in (model, twin))
    )
    after = model.state_dict()
    assert list(after) == list(before) and all(
        torch.equal(after[n], before[n]) and after[n].dtype == before[n].dtype for n in before
    )
    with torch.no_grad():
        assert not torch.equal(model.train()(**inputs, skip_logits=False).logits, twin(inputs["input_ids"]).logits)


def products_of(model, monkeypatch):
    """How many float8 products one forward pass takes, that inside the squared ReLU aside."""
    calls, product = [], float8_layers.product
    monkeypatch.setattr(float8_layers, "product", lambda *args, **kwargs: calls.append(1) or product(*args, **kwargs))
    with torch.no_grad():
        model(**batch())
    return len(calls)


def test_layers_that_do_not_fit_stay_as_they_were(monkeypatch):
    model = tiny(**FORMULAS)
    assert len(with_float8(model, monkeypatch)) == 3
    assert products_of(model, monkeypatch) == 2 * 4
    model = tiny(
        **FORMULAS, hidden_size=64, num_attention_heads=4, num_key_value_heads=1, head_dim=24
    )  # 64 → 96, 24, 24
    assert set(with_float8(model, monkeypatch)) == {"project_and_add", "squared_relu_mlp"}
    assert products_of(model, monkeypatch) == 2 * 2


def test_replaced_layers_and_odd_numbers_of_tokens_are_multiplied_as_before(monkeypatch):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = tiny(**FORMULAS)
    with_float8(model, monkeypatch)
    for layer in model.model.layers:  # as PEFT does, after the kernels came
        for owner, name in ((layer.mlp, "up_proj"), (layer.self_attn, "v_proj"), (layer.self_attn, "o_proj")):
            old = getattr(owner, name)
            setattr(owner, name, Doubled(old.in_features, old.out_features, bias=False))
    assert products_of(model, monkeypatch) == 0
    model, inputs = tiny(**FORMULAS), batch(positions=31)  # 62 tokens
    plain = gradients(model, inputs)
    with_float8(model, monkeypatch)
    ours = gradients(model, inputs)
    assert ours[0] == pytest.approx(plain[0], rel=1e-6) and all(
        relative(ours[1][n], plain[1][n]) < 1e-5 for n in plain[1]
    )


@pytest.mark.parametrize("device", DEVICES)
def test_it_learns_as_float32_does(device, monkeypatch):
    """From the real initialisation, whose o_proj and down_proj are zeros."""
    curves = []
    for use in (False, True):
        model, inputs, losses = tiny(device, random=False, **FORMULAS), batch(device), []
        if use:
            with_float8(model, monkeypatch)
        optimizer = MuonAdamW(build_param_groups(model), orthogonalize_dtype=torch.float32, compile=False)
        for _ in range(30):
            losses.append(gradients(model, inputs)[0])
            optimizer.step()
        curves.append(losses)
    plain, ours = curves
    assert plain[-1] < 0.5 * plain[0]
    assert all(abs(a - b) < 0.03 * plain[0] for a, b in zip(plain, ours, strict=True)), (plain, ours)


def test_checkpointed_layers_have_the_same_gradients(monkeypatch):
    model, inputs = tiny(**FORMULAS), batch()
    with_float8(model, monkeypatch)
    _, kept = gradients(model, inputs)
    enable_checkpointing(model, torch.device("cpu"))
    _, recomputed = gradients(model, inputs)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


@pytest.mark.parametrize(
    ("dtype", "launched"), [("float8", None), ("float8", "bf16"), ("float8", "fp8"), (None, "fp8")]
)
def test_both_ways_to_choose_it_give_bfloat16_to_accelerate(monkeypatch, dtype, launched):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setenv("ACCELERATE_FP8_BACKEND", "AO")  # as the launcher sets it
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setattr(float8, "capable", lambda device: (True, ""))
    accelerator = build_accelerator(1, dtype=dtype)
    assert accelerator.mixed_precision == "bf16" and chose_float8(dtype)
    assert accelerator.fp8_backend.value == "NO"
    monkeypatch.setattr(kernels, "available", lambda device: (True, "a test"))
    model = tiny(**FORMULAS)
    assert "float8_mlp" in install_kernels(TrainConfig.of(output_dir="", dtype=dtype), accelerator, model)
    assert type(accelerator.prepare(model).model.layers[0].mlp.up_proj) is torch.nn.Linear
    with pytest.raises(ValueError, match="float8 is made of kernels, which are off"):
        install_kernels(TrainConfig.of(output_dir="", dtype=dtype, kernels=False), accelerator, model)


@pytest.mark.parametrize(
    ("dtype", "launched", "message"),
    [
        ("float8", None, "--dtype float8: cpu has no float8 products; use bfloat16"),
        (None, "fp8", "mixed_precision=fp8 of the launcher: cpu has no"),
        ("float8", "fp16", "disagrees with the launcher's mixed_precision=fp16"),
        ("bfloat16", "fp8", "disagrees with the launcher's mixed_precision=fp8"),
        ("fp8", None, "--dtype fp8 must be float32, bfloat16, float16 or float8"),
    ],
)
def test_errors(monkeypatch, dtype, launched, message):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(ValueError, match=message):
        accelerate(TrainConfig.of(output_dir="", dtype=dtype))


def test_a_gpu_without_float8_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert float8.capable(torch.device("cuda")) == (
        False,
        "NVIDIA A100 has compute capability 8.0, float8 begins with 8.9",
    )
