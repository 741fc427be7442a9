"""Muon's kernels against its formulas: on a GPU, or by Triton's interpreter."""

import pytest
import torch

from nanochat_hf.optim import MuonAdamW
from tests.support.kernels import DEVICE, relative, triton


@triton
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (80, 80)])  # 96·64 and 80·80 elements do not fill the last block
# bfloat16: one rounds the directions before their division, the other after it
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_muons_kernels_are_its_formulas(shape, dtype, tolerance):
    """Five steps with a schedule, cautious decay and one gradient that is not finite."""
    runs = []
    for fused in (False, True):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for _ in range(3)]
        group = {
            "kind": "muon",
            "params": params,
            "lr": 0.02,
            "momentum": 0.9,
            "betas": (0.0, 0.95),
            "weight_decay": 0.03,
        }
        optimizer = MuonAdamW([group], orthogonalize_dtype=dtype, fused=fused, compile=False)
        for step in range(5):
            optimizer.param_groups[0] |= {"lr": 0.02 * (1 - step / 10), "momentum": 0.85 + step / 100}
            for param in params:
                param.grad = torch.randn(shape, generator=generator).to(DEVICE)
            if step == 3:
                params[1].grad[5, 7] = float("inf")
            optimizer.step()
        (unit,) = optimizer._units
        assert (unit.tables is not None) == fused
        assert optimizer.skipped_steps == 1
        start = [torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)]
        runs.append([*(p.detach() for p in params), unit.buffer, unit.second, params[0].detach() - start[0]])
    for a, b in zip(*runs, strict=True):
        assert relative(b, a) < tolerance, relative(b, a)


@triton
def test_muons_kernels_write_elsewhere_too():
    """As they do for other processes: the parameters stay until all shares are gathered."""
    from nanochat_hf.kernels import muon

    params = [torch.randn(64, 80, device=DEVICE) for _ in range(2)]
    before, out = [p.clone() for p in params], torch.zeros(2, 64, 80, device=DEVICE)
    update, factor = torch.randn(2, 64, 80, device=DEVICE, dtype=torch.bfloat16), torch.rand(2, 1, 80, device=DEVICE)
    tables, ok = muon.Tables(), torch.ones((), dtype=torch.bool, device=DEVICE)
    muon.apply(tables.get("params", params), tables.get("out", list(out)), update, factor, 0.5, 0.0, ok)
    for i, param in enumerate(params):
        assert torch.equal(param, before[i])
        torch.testing.assert_close(out[i], param - 0.5 * update[i].float() * factor[i])
    muon.apply(tables.get("params", params), tables.get("out", list(out)), update, factor, 0.5, 0.0, ~ok)
    assert torch.equal(out, torch.stack(before))


@triton
def test_muon_does_without_kernels_where_they_do_not_fit():
    params = [
        torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in [(6, 5)] * 2
    ]  # 30 elements: the second of a stack is not aligned
    optimizer = MuonAdamW([{"kind": "muon", "params": params, "lr": 0.02}], fused=True, compile=False)
    for param in params:
        param.grad = torch.randn_like(param)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert optimizer._units[0].tables is None
    assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True))
