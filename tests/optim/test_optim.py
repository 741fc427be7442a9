"""MuonAdamW on one process: AdamW is torch's, Muon is the formula in float64, state survives a round trip."""

import copy

import pytest
import torch
from torch import nn

from nanochat_hf.model import NanochatConfig, NanochatForCausalLM
from nanochat_hf.optim import MuonAdamW, OptimizerConfig, apply_schedule, build_param_groups
from nanochat_hf.optim.groups import assign_rules
from nanochat_hf.optim.muon import POLAR_EXPRESS, orthogonalize


def tiny_model():
    config = NanochatConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=32,
    )
    return NanochatForCausalLM(config)


def parameters(*shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, generator=generator).to(dtype)) for shape in shapes]


def set_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def muon_group(params, **settings):
    return {"kind": "muon", "params": params, "lr": 0.02, "momentum": 0.9, "betas": (0.0, 0.95), **settings}


def adamw_group(params, **settings):
    return {"kind": "adamw", "params": params, "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-10, **settings}


def reference_muon(param, grad, buffer, second, lr, weight_decay, momentum, margin=0.02, eq=False, plus=False):
    """One matrix in float64, written from the formulas and without stacks."""
    rows, columns = param.shape
    buffer = momentum * buffer + (1 - momentum) * grad
    x = (1 - momentum) * grad + momentum * buffer
    if eq:
        x = torch.stack([row * (x.norm() / rows**0.5) / max(row.norm().item(), 1e-6) for row in x])
    x = x / ((1 + margin) * x.norm() + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        if rows > columns:
            gram = x.T @ x
            x = a * x + x @ (b * gram + c * gram @ gram)
        else:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
    if plus:
        x = x * min(rows, columns) ** 0.5 / max(x.norm().item(), 1e-6)
    mean = (x**2).mean(1, keepdim=True) if rows >= columns else (x**2).mean(0, keepdim=True)
    second = 0.95 * second + 0.05 * mean
    scaled = x / second.clamp(min=1e-10).sqrt()
    x = scaled * x.norm() / scaled.norm()
    rate = lr * max(1, rows / columns) ** 0.5
    return param - rate * (x + weight_decay * param * (x * param >= 0)), buffer, second


@pytest.mark.parametrize("shape", [(16, 4), (4, 16), (8, 8)])
@pytest.mark.parametrize(
    ("weight_decay", "variant"),
    [
        (0.0, {}),
        (0.3, {}),
        (0.3, {"margin": 0.01, "eq": True}),
        (0.0, {"plus": True}),
        (0.3, {"eq": True, "plus": True}),
    ],
)
def test_muon_is_the_float64_formula(shape, weight_decay, variant):
    params = parameters(shape, shape, shape)
    named = {f"muon_{name}": value for name, value in variant.items()}
    optimizer = MuonAdamW([muon_group(params, weight_decay=weight_decay, **named)], orthogonalize_dtype=torch.float32)
    reduced = (shape[0], 1) if shape[0] >= shape[1] else (1, shape[1])
    expected = [(p.detach().double(), torch.zeros(shape).double(), torch.zeros(reduced).double()) for p in params]
    for step in range(4):
        set_grads(params, step)
        expected = [
            reference_muon(p, param.grad.double(), b, s, 0.02, weight_decay, 0.9, **variant)
            for param, (p, b, s) in zip(params, expected, strict=True)
        ]
        optimizer.step()
    for param, (value, buffer, second) in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach().double(), value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(optimizer.state[param]["momentum_buffer"].double(), buffer, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(optimizer.state[param]["second_momentum"].double(), second, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 32, 16), (3, 16, 32)])
def test_orthogonalized_singular_values_are_near_one(shape, dtype):
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices, dtype)
    assert result.dtype == dtype
    values = torch.linalg.svdvals(result.float())
    assert values.min() > 0.8 and values.max() < 1.2


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torch_adamw(weight_decay):
    ours, theirs = parameters((7, 5), (4,), (300, 64)), parameters((7, 5), (4,), (300, 64))
    optimizer = MuonAdamW([adamw_group(ours, weight_decay=weight_decay)])
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=weight_decay)
    for step in range(5):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def mixed(dtype=torch.float32):
    params = parameters((8, 4), (8, 4), (8, 4), (300, 64), (4,), dtype=dtype)
    return params, MuonAdamW([muon_group(params[:3], weight_decay=0.1), adamw_group(params[3:])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip_continues_exactly_and_in_float32(dtype, tmp_path):
    params, optimizer = mixed(dtype)
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    others, restored = mixed(dtype)
    for other, param in zip(others, params, strict=True):
        other.data.copy_(param.data)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(3, 5):
        for these, one in ((params, optimizer), (others, restored)):
            set_grads(these, step)
            one.step()
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param, other)
        for key, value in restored.state[other].items():
            assert value.dtype == torch.float32
            assert torch.equal(value, optimizer.state[param][key])


def test_full_state_equals_local_state_on_one_process():
    params, optimizer = mixed()
    set_grads(params, 0)
    optimizer.step()
    ours, full = optimizer.state_dict(), optimizer.full_state_dict()
    assert ours["state"].keys() == full["state"].keys()
    for i, values in ours["state"].items():
        assert all(torch.equal(value, full["state"][i][key]) for key, value in values.items())


def test_fresh_state_may_be_loaded_and_parameters_swapped_before_the_first_step():
    params, optimizer = mixed()
    optimizer.load_state_dict(optimizer.state_dict())  # Accelerate does this
    swapped = [nn.Parameter(param.detach().clone()) for param in params]
    optimizer.param_groups[0]["params"], optimizer.param_groups[1]["params"] = swapped[:3], swapped[3:]
    set_grads(swapped, 0)
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(params, swapped, strict=True))


def test_another_processs_share_is_refused():
    params, optimizer = mixed()
    set_grads(params, 0)
    optimizer.step()
    with pytest.raises(ValueError, match="rank 1 of 2"):
        optimizer.load_state_dict({**optimizer.state_dict(), "shard": (1, 2)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 3])
def test_non_finite_gradients_change_nothing_and_are_counted(bad, at):
    params, optimizer = mixed()
    clean_params, clean = mixed()
    for step in range(4):
        before = [param.detach().clone() for param in params]
        set_grads(params, step)
        if step == at:
            params[4].grad[1] = bad
        else:
            set_grads(clean_params, step)
            clean.step()
        optimizer.step()
        if step == at:
            assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert optimizer.skipped_steps == 1
    for param, other in zip(params, clean_params, strict=True):
        assert torch.equal(param, other)


def test_missing_gradients_leave_parameter_and_state_alone():
    params, optimizer = mixed()
    set_grads(params, 0)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    states = [copy.deepcopy(optimizer.state[param]) for param in params]
    set_grads(params, 1)
    params[1].grad = params[3].grad = None
    optimizer.step()
    for i, param in enumerate(params):
        same = i in (1, 3)
        assert torch.equal(param, before[i]) == same
        assert all(torch.equal(value, states[i][key]) for key, value in optimizer.state[param].items()) == same


def test_groups_follow_the_table():
    groups = build_param_groups(tiny_model(), OptimizerConfig(weight_decay=0.2, batch_lr_scale=2.0))
    by_name = {group["name"]: group for group in groups}
    scale = 2.0 * (64 / 768) ** -0.5
    assert by_name["unembedding"]["lr"] == pytest.approx(0.004 * scale)
    assert by_name["embedding"]["lr"] == by_name["value_embeds"]["lr"] == pytest.approx(0.3 * scale)
    assert by_name["resid_lambdas"]["lr"] == pytest.approx(0.01)
    assert by_name["x0_lambdas"]["lr"] == pytest.approx(1.0)
    assert by_name["x0_lambdas"]["betas"] == (0.96, 0.95)
    muon = [group for group in groups if group["kind"] == "muon"]
    assert {group["name"] for group in muon} >= {"matrix_64x64", "matrix_256x64", "matrix_64x256", "matrix_1x32"}
    assert all(group["lr"] == pytest.approx(0.04) and group["weight_decay"] == 0.2 for group in muon)
    assert all(group["weight_decay"] == 0 for group in groups if group["kind"] == "adamw")


def test_groups_own_every_parameter_once():
    model = tiny_model()
    owned = [id(param) for group in build_param_groups(model) for param in group["params"]]
    assert sorted(owned) == sorted(id(param) for param in model.parameters())


def test_frozen_parameters_are_left_out():
    model = tiny_model()
    model.lm_head.weight.requires_grad_(False)
    assert "unembedding" not in {group["name"] for group in build_param_groups(model)}


def test_unowned_parameters_and_idle_rules_are_named():
    with pytest.raises(ValueError, match=r"model.adapter.weight"):
        assign_rules(["lm_head.weight", "model.adapter.weight"])
    with pytest.raises(ValueError, match=r"rule b .* takes no parameter"):
        assign_rules(["a.weight"], ((r"^a", "a"), (r"^b", "b")))
    assert assign_rules(["a.x", "a.y"], ((r"x$", "first"), (r"^a", "second"))) == {"first": ["a.x"], "second": ["a.y"]}


def test_rules_follow_a_model_without_value_embeddings():
    model = tiny_model()
    config = NanochatConfig(**{**model.config.to_dict(), "use_value_embeddings": False})
    bare = NanochatForCausalLM(config).train()
    groups = build_param_groups(bare)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in bare.parameters())
    optimizer, ids = MuonAdamW(groups), torch.arange(24).view(2, 12)
    losses = []
    for _ in range(8):
        losses.append(bare(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    model.config.use_value_embeddings = False  # says no, has them: nobody would train them
    with pytest.raises(ValueError, match=r"value_embeds.1.weight is taken by no optimizer rule"):
        build_param_groups(model)


def test_refusals():
    with pytest.raises(ValueError, match="matrix_lr=-1"):
        OptimizerConfig(matrix_lr=-1)
    with pytest.raises(ValueError, match="kind"):
        MuonAdamW([{"params": parameters((2, 2))}])
    odd = parameters((2, 2), (2, 3))
    optimizer = MuonAdamW([muon_group(odd)])
    set_grads(odd, 0)
    with pytest.raises(ValueError, match="mixes"):
        optimizer.step()


def test_apply_schedule():
    _, optimizer = mixed()
    apply_schedule(optimizer, 0.5, 0.87, 0.25)
    muon, adamw = optimizer.param_groups
    assert (muon["lr"], muon["momentum"], muon["weight_decay"]) == (0.01, 0.87, 0.025)
    assert (adamw["lr"], adamw["weight_decay"]) == (0.005, 0.0)
    apply_schedule(optimizer, 1.0, 0.95)
    assert (muon["lr"], muon["weight_decay"]) == (0.02, 0.1)


def test_closure_is_evaluated_with_gradients():
    params, optimizer = mixed()

    def closure():
        loss = sum((param**2).sum() for param in params)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert all(param.grad is not None for param in params)


def test_ten_steps_on_a_whole_model_follow_the_formulas():
    """Every parameter of a d4, against float64 Muon and torch's AdamW, with fixed gradients and moving schedules."""
    torch.manual_seed(0)
    model = NanochatForCausalLM(
        NanochatConfig(vocab_size=100, hidden_size=64, num_hidden_layers=4, num_attention_heads=2)
    )
    groups = build_param_groups(model, OptimizerConfig(weight_decay=0.1))
    assert {name for group in groups for name in group["param_names"]} == {name for name, _ in model.named_parameters()}
    optimizer = MuonAdamW(groups, orthogonalize_dtype=torch.float32)
    plain, matrices = [], {}
    for group in groups:
        for param in group["params"]:
            if group["kind"] == "muon":
                reduced = (param.shape[0], 1) if param.shape[0] >= param.shape[1] else (1, param.shape[1])
                zeros = torch.zeros(param.shape, dtype=torch.float64), torch.zeros(reduced, dtype=torch.float64)
                matrices[param] = param.detach().double(), *zeros
            else:
                copy_ = nn.Parameter(param.detach().clone())
                plain.append(
                    (
                        group,
                        param,
                        copy_,
                        torch.optim.AdamW([copy_], lr=group["lr"], betas=group["betas"], eps=1e-10, weight_decay=0.0),
                    )
                )
    for step in range(10):
        apply_schedule(optimizer, 1 - step / 20, 0.85 + step / 100, 1 - step / 10)
        set_grads(model.parameters(), step)
        for group in optimizer.param_groups:
            for param in group["params"] if group["kind"] == "muon" else ():
                values = group["lr"], group["weight_decay"], group["momentum"]
                matrices[param] = reference_muon(matrices[param][0], param.grad.double(), *matrices[param][1:], *values)
        for group, param, twin, reference in plain:
            reference.param_groups[0]["lr"] = group["initial_lr"] * (1 - step / 20)
            twin.grad = param.grad.clone()
            reference.step()
        optimizer.step()
    for param, (expected, *_) in matrices.items():
        # a norm: where update and weight nearly cancel, float32 may see the other sign and decay one weight more or
        # less
        assert (param.double() - expected).norm() < 1e-4 * expected.norm()
    for _, param, twin, _ in plain:
        torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)


def test_schedules_never_recompile(monkeypatch):
    from functools import partial

    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    params = parameters((8, 4), (8, 4), (256, 128))
    optimizer = MuonAdamW([muon_group(params[:2], weight_decay=0.1), adamw_group(params[2:])], compile=True)
    counts = []
    for step in range(5):
        apply_schedule(optimizer, 1 - step / 10, 0.85 + step / 100, 1 - step / 5)
        set_grads(params, step)
        optimizer.step()
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1] == 2  # Muon's kernel and AdamW's, once each


def test_the_parameter_with_a_non_finite_gradient_is_named():
    model = tiny_model()
    optimizer = MuonAdamW(build_param_groups(model))
    name = "model.layers.1.mlp.up_proj.weight"
    for step in range(3):
        set_grads(model.parameters(), step)
        if step:
            dict(model.named_parameters())[name].grad[0, 0] = float("inf")
        optimizer.step()
        assert optimizer.non_finite() == ((step, name) if step else (0, None))
    set_grads(model.parameters(), 9)
    optimizer.step()
    assert optimizer.non_finite() == (0, None) and optimizer.skipped_steps == 2


def test_the_state_of_another_architecture_is_named():
    state = MuonAdamW(build_param_groups(tiny_model())).state_dict()
    other = NanochatForCausalLM(
        NanochatConfig(vocab_size=100, hidden_size=128, num_hidden_layers=2, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="group matrix_"):
        MuonAdamW(build_param_groups(other)).load_state_dict(state)
    deeper = NanochatForCausalLM(
        NanochatConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    with pytest.raises(ValueError, match="has 1 parameters there and 2 here"):
        MuonAdamW(build_param_groups(deeper)).load_state_dict(state)


def test_gradient_norms_are_those_of_each_group():
    from nanochat_hf.optim import gradient_norms

    model = tiny_model()
    set_grads(model.parameters(), 0)
    optimizer = MuonAdamW(build_param_groups(model))
    norms = gradient_norms(optimizer)
    assert norms["unembedding"] == pytest.approx(model.lm_head.weight.grad.norm().item())
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    assert total == pytest.approx(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
