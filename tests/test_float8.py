"""Training by float8 products against float64 and float32: on a GPU that has them, else on the CPU, whose torch._scaled_mm multiplies them too.

Tolerances: rounding to e4m3 (3 bits of mantissa) has a relative error of 2^-4 at most and about 2.6 % in the mean, to e5m2 (2 bits) 2^-3 and 5.2 %; errors of
factors add up in squares. So a product of two e4m3 is 3.7 % off and one with an e5m2 gradient 5.8 %; the MLP squares one result and its gradient passes
through two roundings to e5m2.
"""

from copy import deepcopy
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState

from nanochat_hf import NanochatConfig, NanochatForCausalLM, kernels, runtime
from nanochat_hf.kernels import float8, float8_layers
from nanochat_hf.optim import MuonAdamW, build_param_groups
from scripts.training import TrainConfig, install_kernels

CAPABLE = torch.cuda.is_available() and float8.capable(torch.device("cuda"))[0]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CAPABLE, reason="no CUDA device with float8 products"))]
triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
FORMULAS = dict(rms_norm_eps=1e-6, final_logit_softcapping=50.0)  # settings which the other kernels do not know, so that no Triton is needed
IDS = 256


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    AcceleratorState._reset_state(True)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def tiny(device="cpu", random=True, **settings):
    torch.manual_seed(0)
    sizes = dict(vocab_size=IDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
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


def plain_projections(x, q, k, v):
    return F.linear(x, torch.cat((q, k))), F.linear(x, v)


def plain_mlp(x, up, down):
    return F.linear(F.relu(F.linear(x, up)).square(), down)


def tensors(part, N=256, C=128):
    torch.manual_seed(0)
    x = F.rms_norm(torch.randn(2, N // 2, C), (C,))
    if part == "projections":
        return x, *(torch.randn(width, C) / 8 for width in (C, 64, 64))
    return (x * 30, torch.randn(64, C) / 8) if part == "linear" else (x, torch.randn(4 * C, C) / 8, torch.randn(C, 4 * C) / 16)


PARTS = {
    "projections": (float8_layers.Projections.apply, plain_projections, (0.042, 0.065)), "linear": (float8_layers.Linear.apply, F.linear, (0.042, 0.065)),
    "mlp": (float8_layers.SquaredReluMLP.apply, plain_mlp, (0.07, 0.105)),
}  # fmt: skip


def outputs_and_gradients(function, inputs, slopes=1.0):
    inputs = [t.clone().requires_grad_() for t in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(2)
    torch.autograd.backward(outputs, [(torch.randn(y.shape, generator=generator) * slopes).to(y) for y in outputs])
    return list(outputs), [t.grad for t in inputs]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slopes", [1.0, 1e-9])  # of a mean over 1e6 tokens
@pytest.mark.parametrize("part", PARTS)
def test_each_part_is_its_formula_up_to_float8(part, slopes, device):
    ours, formula, tolerances = PARTS[part]
    inputs = tensors(part)
    exact = outputs_and_gradients(formula, [t.double() for t in inputs], slopes)
    got = outputs_and_gradients(ours, [t.to(device) for t in inputs], slopes)
    for found, expected, tolerance in zip(got, exact, tolerances, strict=True):
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == torch.float32 and relative(a.cpu(), b) < tolerance, relative(a.cpu(), b)


@pytest.mark.parametrize("part", PARTS)
def test_tensors_of_zeros_give_zeros(part):
    inputs = tensors(part)
    for index in range(len(inputs)):
        some = [t * (i != index) for i, t in enumerate(inputs)]
        outputs, grads = outputs_and_gradients(PARTS[part][0], some)
        exact = outputs_and_gradients(PARTS[part][1], some)
        for a, b in zip([*outputs, *grads], [*exact[0], *exact[1]], strict=True):
            assert a.isfinite().all() and (b.count_nonzero() or not a.count_nonzero())


@pytest.mark.parametrize("part", PARTS)
def test_what_is_not_finite_is_not_hidden(part):
    """The optimizer leaves out matrices whose gradient is not finite, so a broken one may not come back as numbers."""
    ours, inputs = PARTS[part][0], tensors(part)
    _, grads = outputs_and_gradients(ours, inputs, slopes=float("nan"))
    assert not any(grad.isfinite().all() for grad in grads)
    outputs, _ = outputs_and_gradients(ours, [inputs[0], *(torch.full_like(t, float("inf")) for t in inputs[1:])])
    assert not any(y.isfinite().all() for y in outputs)


def test_backward_keeps_one_byte_an_element():
    kept = []
    x, up, down = (t.requires_grad_() for t in tensors("mlp"))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        float8_layers.SquaredReluMLP.apply(x, up, down)
    large = [t for t in kept if t.numel() > 1]
    assert all(t.element_size() == 1 for t in large) and sum(t.numel() for t in large) == x.numel() * 5 + up.numel() + down.numel()


def test_rows_longer_than_any_row_before_still_fit_their_bound():
    """All of a row in one channel, and a weight that looks along it: what the bounds of Cauchy and Schwarz are for."""
    C = 64
    x = torch.zeros(16, C)
    x[:, 3] = C**0.5
    up, down = torch.zeros(4 * C, C), torch.eye(C, 4 * C)
    up[:, 3] = 2.0
    y = float8_layers.SquaredReluMLP.apply(x, up, down)
    torch.testing.assert_close(y, plain_mlp(x, up, down), rtol=0.01, atol=0)


@triton
@pytest.mark.parametrize("shape", [(48, 16), (128, 64), (272, 80)])
def test_the_casting_kernel_writes_both_layouts(shape):
    """Of numbers that float8 holds exactly, since Triton's interpreter rounds others wrongly where a carry reaches the exponent."""
    from nanochat_hf.kernels import float8_casts

    device = "cuda" if CAPABLE else "cpu"
    generator = torch.Generator().manual_seed(0)

    def chosen(values, *shape):
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)].to(device)

    n, c = shape
    unit, other = torch.tensor(0.25, device=device), torch.tensor(4.0, device=device)
    x = chosen([-3.0, -0.5, 0.0, 1.0, 1.5, 2.0], n, c).bfloat16()
    kept = chosen([0.0, 1.0, 4.0, 0.25], c, n).to(float8.E4M3)
    expected = {
        (float8_casts.CAST, float8.E5M2): x.float() * 4, (float8_casts.SQUARE, float8.E4M3): x.float().relu().square() * 4,
        (float8_casts.SLOPE, float8.E5M2): x.float() * 2 * (kept.t().float() * 4).sqrt() * 4,
    }  # fmt: skip
    for (mode, dtype), values in expected.items():
        wide = torch.zeros(n, 2 * c, device=device).to(dtype), torch.zeros(2 * c, n, device=device).to(dtype)
        out, turned = wide[0][:, c:], wide[1][c:]
        float8_casts.launch(mode, x, out, turned, unit, kept, other)
        assert torch.equal(out.float(), values) and torch.equal(turned.float(), values.t())
        assert not wide[0][:, :c].float().any() and not wide[1][:c].float().any()
        again = torch.empty(c, n, device=device, dtype=dtype)
        float8_casts.launch(float8_casts.TRANSPOSE, out, None, again)
        assert torch.equal(again.float(), values.t())
    if device == "cuda":
        x = torch.randn(n, c, device=device)
        for dtype in (float8.E4M3, float8.E5M2):
            out, turned = float8.cast([x], float8.unit_of(x.abs().amax(), dtype), dtype, 1)
            assert torch.equal(turned.float(), out.t().float()) and relative(out, float8.scaled(x, float8.unit_of(x.abs().amax(), dtype), dtype)) < 1e-2


@triton
@pytest.mark.parametrize("shape", [(48, 16, 64), (272, 144, 400)])
def test_the_products_with_casts_inside_are_those_with_casts_after(shape):
    """Of numbers that float8 holds exactly, for the same reason."""
    pytest.importorskip("triton.tools.tensor_descriptor")
    if not CAPABLE and version("triton") < "3.7":
        pytest.skip("the interpreter of Triton before 3.7 cannot loop to a number that is computed, under numpy 2.4")
    from nanochat_hf.kernels import float8_matmul

    device = "cuda" if CAPABLE else "cpu"
    N, C, W = shape
    generator = torch.Generator().manual_seed(0)

    def sparse(rows, values):
        """One number in each row, so that no sum has to be rounded."""
        at = torch.randint(C, (rows, 1), generator=generator)
        return torch.zeros(rows, C).scatter(1, at, torch.tensor(values)[torch.randint(len(values), (rows, 1), generator=generator)]).to(device)

    x, w, units = sparse(N, [1.0, -2.0, 0.5]), sparse(W, [1.0, 2.0]), [torch.tensor(value, device=device) for value in (2.0, 0.5)]
    unit, kept_unit = torch.tensor(0.25, device=device), torch.tensor(4.0, device=device)
    w = w.index_add(1, torch.arange(0, C, 3, device=device), torch.ones(W, len(range(0, C, 3)), device=device))  # enough that is not 0
    a, a_t = float8_matmul.launch(x.to(float8.E4M3), w.to(float8.E4M3), units, unit, float8.E4M3)
    expected = (x @ w.t()).relu().square() * 4
    assert expected.count_nonzero() > expected.numel() / 16
    assert torch.equal(a.float(), expected.to(float8.E4M3).float()) and torch.equal(a_t.float(), a.float().t())
    kept = torch.tensor([0.0, 1.0, 4.0])[torch.randint(3, (W, N), generator=generator)].to(device)
    s, s_t = float8_matmul.launch(x.to(float8.E5M2), w.to(float8.E4M3), units, unit, float8.E5M2, kept.to(float8.E4M3), kept_unit)
    expected = (x @ w.t()) * 2 * (kept.t() * 4).sqrt() * 4
    assert torch.equal(s.float(), expected.to(float8.E5M2).float()) and torch.equal(s_t.float(), s.float().t())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", [FORMULAS, pytest.param({}, marks=triton)], ids=["formulas", "kernels"])
@pytest.mark.parametrize("compile", [False, True])
def test_all_of_a_model_has_a_gradient_near_float32s(settings, compile, device):
    model, inputs = tiny(device, **settings), batch(device)
    loss, exact = gradients(model, inputs)
    kernels.install(model, float8=True)
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
def test_evaluation_is_the_plain_model_to_the_bit(device):
    model, inputs = tiny(device, **FORMULAS), batch(device)
    twin = deepcopy(model).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kernels.install(model, float8=True)
    gradients(model, inputs)  # as in a training under way
    model.eval()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        ours, plain = (each(inputs["input_ids"]).logits for each in (model, twin))
    assert torch.equal(ours, plain)
    assert torch.equal(*(each.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False) for each in (model, twin)))
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) and after[n].dtype == before[n].dtype for n in before)
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
    assert kernels.install(model, float8=True)[-1].startswith("float8 products of 12 of the layers' 12 matrices")
    assert products_of(model, monkeypatch) == 2 * 4
    model = tiny(**FORMULAS, hidden_size=64, num_attention_heads=4, num_key_value_heads=1, head_dim=24)  # 64 → 96, 24, 24
    assert kernels.install(model, float8=True)[-1].startswith("float8 products of 6 of the layers' 12 matrices")
    assert products_of(model, monkeypatch) == 2 * 2


def test_replaced_layers_and_odd_numbers_of_tokens_are_multiplied_as_before(monkeypatch):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = tiny(**FORMULAS)
    kernels.install(model, float8=True)
    for layer in model.model.layers:  # as PEFT does, after the kernels came
        for owner, name in ((layer.mlp, "up_proj"), (layer.self_attn, "v_proj"), (layer.self_attn, "o_proj")):
            old = getattr(owner, name)
            setattr(owner, name, Doubled(old.in_features, old.out_features, bias=False))
    assert products_of(model, monkeypatch) == 0
    model, inputs = tiny(**FORMULAS), batch(positions=31)  # 62 tokens
    plain = gradients(model, inputs)
    kernels.install(model, float8=True)
    ours = gradients(model, inputs)
    assert ours[0] == pytest.approx(plain[0], rel=1e-6) and all(relative(ours[1][n], plain[1][n]) < 1e-5 for n in plain[1])


@pytest.mark.parametrize("device", DEVICES)
def test_it_learns_as_float32_does(device):
    """From the real initialisation, whose o_proj and down_proj are zeros."""
    curves = []
    for use in (False, True):
        model, inputs, losses = tiny(device, random=False, **FORMULAS), batch(device), []
        if use:
            kernels.install(model, float8=True)
        optimizer = MuonAdamW(build_param_groups(model), orthogonalize_dtype=torch.float32, compile=False)
        for _ in range(30):
            losses.append(gradients(model, inputs)[0])
            optimizer.step()
        curves.append(losses)
    plain, ours = curves
    assert plain[-1] < 0.5 * plain[0]
    assert all(abs(a - b) < 0.03 * plain[0] for a, b in zip(plain, ours, strict=True)), (plain, ours)


def test_checkpointed_layers_have_the_same_gradients():
    model, inputs = tiny(**FORMULAS), batch()
    kernels.install(model, float8=True)
    _, kept = gradients(model, inputs)
    runtime.enable_checkpointing(model, torch.device("cpu"))
    _, recomputed = gradients(model, inputs)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


@pytest.mark.parametrize(("dtype", "launched"), [("float8", None), ("float8", "bf16"), ("float8", "fp8"), (None, "fp8")])
def test_both_ways_to_choose_it_give_bfloat16_to_accelerate(monkeypatch, dtype, launched):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setenv("ACCELERATE_FP8_BACKEND", "AO")  # as the launcher sets it
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setattr(float8, "capable", lambda device: (True, ""))
    accelerator = runtime.build_accelerator(1, dtype=dtype)
    assert accelerator.mixed_precision == "bf16" and runtime.chose_float8(dtype)
    assert accelerator.fp8_backend.value == "NO"
    monkeypatch.setattr(kernels, "available", lambda device: (True, "a test"))
    model = tiny(**FORMULAS)
    assert "float8 products of 12 of the layers' 12" in install_kernels(TrainConfig(output_dir="", dtype=dtype), accelerator, model)
    assert type(accelerator.prepare(model).model.layers[0].mlp.up_proj) is torch.nn.Linear
    with pytest.raises(ValueError, match="float8 is made of kernels, which are off"):
        install_kernels(TrainConfig(output_dir="", dtype=dtype, kernels=False), accelerator, model)


@pytest.mark.parametrize(("dtype", "launched", "message"), [
    ("float8", None, "--dtype float8: cpu has no float8 products; use bfloat16"), (None, "fp8", "mixed_precision=fp8 of the launcher: cpu has no"),
    ("float8", "fp16", "disagrees with the launcher's mixed_precision=fp16"), ("bfloat16", "fp8", "disagrees with the launcher's mixed_precision=fp8"),
    ("fp8", None, "--dtype fp8 must be float32, bfloat16, float16 or float8"),
])  # fmt: skip
def test_errors(monkeypatch, dtype, launched, message):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(ValueError, match=message):
        runtime.build_accelerator(1, dtype=dtype)


def test_a_gpu_without_float8_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert float8.capable(torch.device("cuda")) == (False, "NVIDIA A100 has compute capability 8.0, float8 begins with 8.9")
