"""A model with kernels computes what the model without them does. Runs on a GPU or by Triton's interpreter."""

import pytest
import torch

from nanochat_hf.model.ops_nanochat_hf import PLAIN
from tests.support.kernels import DEVICE, batch, compiled, gradients, relative, tiny, triton, with_kernels


class Halved(torch.nn.Linear):
    """Stands for what replaces a linear layer later: float8, an adapter."""

    def forward(self, x):
        return super().forward(x) / 2


@triton
@pytest.mark.parametrize(("owner", "name"), [("mlp", "up_proj"), ("self_attn", "k_proj")])
def test_layers_replaced_after_the_kernels_came_are_called(owner, name):
    model, inputs = tiny(), batch()
    for layer in model.model.layers:
        old = getattr(getattr(layer, owner), name)
        new = Halved(old.in_features, old.out_features, bias=False)
        new.load_state_dict(old.state_dict())
        setattr(getattr(layer, owner), name, new)
    loss, plain = gradients(model, inputs)
    names = {"mlp": "squared_relu", "self_attn": "rope_norm"}
    with_kernels(model, names[owner])
    fused_loss, fused = gradients(model, inputs)
    assert fused_loss == loss and all(torch.equal(fused[key], plain[key]) for key in plain)


@triton
def test_the_whole_model_with_kernels_is_the_model_in_float32():
    model, inputs = tiny(DEVICE), batch(DEVICE)
    loss, plain = gradients(model, inputs)
    with_kernels(model)
    assert (
        sum(op is not formula for op, formula in zip(vars(model.model.ops).values(), vars(PLAIN).values(), strict=True))
        >= 8
    )
    fused_loss, fused = gradients(model, inputs)
    assert abs(fused_loss - loss) < 2e-5
    assert max(relative(fused[name], plain[name]) for name in plain) < 1e-4


@triton
@pytest.mark.parametrize("compile", [False, True])
def test_with_kernels_bfloat16_strays_no_further_from_float32(compile):
    model, inputs = tiny(DEVICE), batch(DEVICE)
    _, exact = gradients(model, inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        _, plain = gradients(model, inputs)
        with_kernels(model)
        _, fused = gradients(model, inputs, compiled(model) if compile else None)
    matrices = [name for name in exact if exact[name].ndim == 2]
    for name in matrices:
        assert relative(fused[name], exact[name]) < 1.5 * relative(plain[name], exact[name]) + 2e-3, name


@triton
@pytest.mark.parametrize("compile", [False, True])
def test_a_model_by_the_kernels_of_the_stream_has_its_gradients(compile):
    """All layers, with value embeddings in every second, and x0 handed from layer to layer."""
    model, inputs = tiny(DEVICE), batch(DEVICE)
    loss, plain = gradients(model, inputs)
    with_kernels(model, "mix_and_norm", "stream_and_norm")
    fused_loss, fused = gradients(model, inputs, compiled(model) if compile else None)
    assert abs(fused_loss - loss) < 1e-5 * loss
    assert max(relative(fused[name], plain[name]) for name in plain) < 1e-4


@triton
def test_hidden_states_are_the_formulas():
    model, inputs = tiny(DEVICE), batch(DEVICE)
    plain = model(**inputs, output_hidden_states=True).hidden_states
    with_kernels(model)
    for a, b in zip(model(**inputs, output_hidden_states=True).hidden_states, plain, strict=True):
        assert relative(a, b) < 1e-5


@triton
def test_gated_rows_are_the_same_every_time():
    model, inputs = tiny(DEVICE), batch(DEVICE)
    with_kernels(model)
    first, second = (gradients(model, inputs)[1] for _ in range(2))
    for name in first:
        if "value_embeds" in name or "ve_gate" in name:
            assert torch.equal(first[name], second[name])


@triton
def test_tables_that_are_replaced_are_called():
    model, inputs = tiny(DEVICE), batch(DEVICE)
    name, table = next(iter(model.model.value_embeds.items()))
    model.model.value_embeds[name] = torch.nn.Sequential(table)
    loss, _ = gradients(model, inputs)
    called = []
    model.model.value_embeds[name].register_forward_hook(lambda *args: called.append(1))
    assert gradients(with_kernels(model, "gated_rows"), inputs)[0] == pytest.approx(loss, rel=1e-5) and called


@triton
def test_evaluation_and_generation_use_the_formulas():
    model, inputs = tiny(DEVICE), batch(DEVICE)["input_ids"]
    expected = model.eval()(inputs).logits
    with_kernels(model)
    assert model.model.ops is PLAIN and torch.equal(model(inputs).logits, expected)
    assert model.train().model.ops is not PLAIN
