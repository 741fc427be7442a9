"""Gradients of weights and tables by kernels of their own, and products with more inside by cuDNN, against the formulas.
On a GPU, or by Triton's interpreter where triton is installed without one."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from nanochat_hf import kernels
from nanochat_hf.kernels import cudnn_products
from tests.kernels.test_kernels import DEVICE, batch, gradients, relative, tiny

triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
hopper = pytest.mark.skipif(
    DEVICE == "cpu" or not cudnn_products.serves(torch.device(DEVICE)), reason="needs a Hopper GPU with nvidia-cudnn-frontend"
)
HALF = DEVICE == "cuda"
KIND, TOLERANCE = (torch.bfloat16, 5e-3) if HALF else (torch.float32, 1e-5)


def randoms(*shapes, dtype=KIND):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


@pytest.fixture(params=[False, True], ids=["as they are done", "in one order"])
def one_order(request):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(before)


@triton
@pytest.mark.parametrize(("shape", "programs", "cuts"), [
    ((700, 384, 256), 2, 1),  # a round and a half, no more cuts
    ((640, 304, 520), 4, 2),  # tiles that reach beyond the result; the last piece cut again
    ((70, 640, 704), 7, 3),  # fewer steps than pieces would have
])  # fmt: skip
def test_a_weight_gradient_is_added_by_pieces(shape, programs, cuts, one_order):
    pytest.importorskip("triton.tools.tensor_descriptor")
    from nanochat_hf.kernels import weight_gradient as module

    N, G, K = shape
    g, x = randoms((N, G), (N, K))
    tiles, steps = -(-G // module.ROWS) * -(-K // module.COLUMNS), -(-N // module.DEPTH)
    pieces, expected = module.cut(tiles, steps, programs, cuts), g.float().mT @ x.float()
    totals = [torch.ones(G, K, device=DEVICE) for _ in range(2)]
    for total in totals:
        module.by_pieces(g, x, total, pieces, programs)
        assert relative(total - 1, expected) < 1e-5
    assert torch.equal(*totals) or not one_order


@triton
@pytest.mark.parametrize("tiles", [1, 5, 68, 133, 200, 400])
def test_all_steps_of_a_tile_are_in_its_pieces_once(tiles):
    pytest.importorskip("triton.tools.tensor_descriptor")
    from nanochat_hf.kernels import weight_gradient as module

    for cuts in (1, 2, 3, 4):
        pieces = module.cut(tiles, 1024, 132, cuts)
        steps = [[] for _ in range(tiles)]
        for tile, begin, end in pieces:
            steps[tile] += range(begin, end)
        assert all(sorted(each) == list(range(1024)) for each in steps)


@triton
def test_tiles_are_cut_where_programs_come_near_to_equal_shares():
    pytest.importorskip("triton.tools.tensor_descriptor")
    from nanochat_hf.kernels.weight_gradient import plan

    assert len(plan(65536, 5120, 1280, 132)) > 200  # tiles for 132 multiprocessors
    assert len(plan(131072, 2304, 768, 132)) > 54
    assert plan(131072, 768, 768, 132) is None  # 18: the pieces' own cost would be a tenth
    assert plan(32768, 1024, 256, 132) is None


@triton
def test_the_operator_of_weight_gradients_is_the_product():
    pytest.importorskip("triton.tools.tensor_descriptor")
    from nanochat_hf.kernels.weight_gradient import weight_gradient

    wide, narrow = randoms((256, 5120 if HALF else 80), (256, 1280 if HALF else 48))
    for g, x in ((wide, narrow), (narrow, wide)):
        got, expected = weight_gradient(g, x, torch.float32), g.float().mT @ x.float()
        assert got.dtype == torch.float32 and relative(got, expected) < TOLERANCE


@triton
@pytest.mark.parametrize("ids", ["all", "few", "one", "long"])
def test_gated_rows(ids):
    """Ids that all occur, of which many do not, that are one alone, and one with more tokens than a program takes."""
    from nanochat_hf.kernels import value_embedding

    generator, (B, T, K, D), rows = torch.Generator().manual_seed(0), (2, 170, 3, 32), {"few": 500}.get(ids, 40)
    index = torch.randint(rows, (B, T), generator=generator)
    if ids == "one":
        index[:] = 7
    elif ids == "long":
        index[1, 10:], index[0, 40:60] = 3, 3
    index = index.to(DEVICE)
    table, gate = torch.randn(rows, K * D, generator=generator).to(DEVICE), torch.rand(B, T, K, generator=generator).to(DEVICE, KIND)
    d = torch.randn(B, T, 3 * K * D, generator=generator).to(DEVICE, KIND)[..., 2 * K * D :].unflatten(-1, (K, D))  # values' part of one tensor
    runs = []
    for fused in (True, False):
        weight, strength = table.clone().requires_grad_(), gate.clone().float().requires_grad_()
        if fused:
            result = value_embedding.GatedRows.apply(strength.to(KIND), weight, index, *value_embedding.order_of_ids(index, rows))
        else:
            result = strength.unsqueeze(-1) * F.embedding(index, weight).unflatten(-1, (K, D))
        result.backward(d.to(result.dtype))
        runs.append((result.float(), weight.grad, strength.grad))
    for a, b in zip(*runs, strict=True):
        assert relative(a, b) < TOLERANCE


@triton
def test_gated_rows_are_the_same_every_time():
    model, inputs = tiny(DEVICE), batch(DEVICE)
    kernels.install(model)
    first, second = (gradients(model, inputs)[1] for _ in range(2))
    for name in first:
        if "value_embeds" in name or "ve_gate" in name:
            assert torch.equal(first[name], second[name])


@triton
def test_tables_in_parts_or_replaced_are_looked_up_as_ever():
    model = tiny(DEVICE)
    tables, ids = model.model.value_embeds, batch(DEVICE)["input_ids"]
    assert kernels.ordered_tables(tables, ids, KIND).keys() == {int(name) for name in tables}
    name, table = next(iter(tables.items()))
    table.weight.device_mesh = None  # as FSDP2's have one
    assert kernels.ordered_tables(tables, ids, KIND) == {}
    tables[name] = torch.nn.Sequential(table)
    assert kernels.ordered_tables(tables, ids, KIND) == {}


def test_the_stream_and_a_product():
    """LinearPlus: by cuDNN on Hopper, elsewhere by torch."""
    y, weight, stream, slope = randoms((2, 70, 64), (48, 64), (2, 70, 48), (2, 70, 48))
    runs = []
    for function in (cudnn_products.LinearPlus.apply, lambda y, w, x: x + F.linear(y, w)):
        dtype = None if runs else KIND
        leaves = [t.clone().to(dtype or torch.float32).requires_grad_() for t in (y, weight, stream)]
        out = function(*leaves)
        out.backward(slope.to(out.dtype))
        runs.append([out, *(t.grad for t in leaves)])
    for a, b in zip(*runs, strict=True):
        assert relative(a.float(), b) < TOLERANCE


@hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "C"), [(4096, 768), (1000, 1280), (128, 64)])
def test_cudnns_products(dtype, N, C):
    """That it is cuDNN which computes them, and right."""
    dy, down, kept, stream = randoms((N, C), (C, 4 * C), (N, 4 * C), (N, C), dtype=dtype)
    kept = kept.relu().square()
    assert cudnn_products.plan_of("slope", dy.device, dtype, N, C, 4 * C) and cudnn_products.plan_of("sum", dy.device, dtype, N, C, C)
    assert relative(cudnn_products.slope(dy, down, kept), (dy.float() @ down.float()) * 2 * kept.float().sqrt()) < 5e-3
    weight = down[:, :C].contiguous()
    assert relative(cudnn_products.product_plus(dy, weight, stream), dy.float() @ weight.float().mT + stream.float()) < 5e-3
