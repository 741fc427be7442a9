"""Gradients of weights by pieces, and products with more inside by cuDNN, against the formulas.

On a GPU, or by Triton's interpreter where triton is installed without one.
"""

import pytest
import torch
import torch.nn.functional as F

from nanochat_hf.kernels.lib import cudnn_attention, cudnn_products, weights
from nanochat_hf.kernels.lib.devices import lacks_hopper
from nanochat_hf.kernels.ops.output_and_stream import LinearPlus
from tests.support.kernels import DEVICE, HALF, KIND, TOLERANCE, randoms, relative, triton

SERVES = HALF and not lacks_hopper(torch.device(DEVICE), KIND) and not cudnn_attention.missing(torch.device(DEVICE))
hopper = pytest.mark.skipif(not SERVES, reason="needs a Hopper GPU with nvidia-cudnn-frontend")


@pytest.fixture(params=[False, True], ids=["as they are done", "in one order"])
def one_order(request):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(before)


@triton
@pytest.mark.parametrize(
    ("shape", "programs", "cuts"),
    [
        ((700, 384, 256), 2, 1),  # a round and a half, no more cuts
        ((640, 304, 520), 4, 2),  # tiles that reach beyond the result; the last piece cut again
        ((70, 640, 704), 7, 3),  # fewer steps than pieces would have
    ],
)
def test_a_weight_gradient_is_added_by_pieces(shape, programs, cuts, one_order):
    pytest.importorskip("triton.tools.tensor_descriptor")
    from nanochat_hf.kernels.lib import weight_gradient as module

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
    from nanochat_hf.kernels.lib import weight_gradient as module

    for cuts in (1, 2, 3, 4):
        pieces = module.cut(tiles, 1024, 132, cuts)
        steps = [[] for _ in range(tiles)]
        for tile, begin, end in pieces:
            steps[tile] += range(begin, end)
        assert all(sorted(each) == list(range(1024)) for each in steps)


@triton
def test_tiles_are_cut_where_programs_come_near_to_equal_shares():
    pytest.importorskip("triton.tools.tensor_descriptor")
    from nanochat_hf.kernels.lib.weight_gradient import plan

    assert len(plan(65536, 5120, 1280, 132)) > 200  # tiles for 132 multiprocessors
    assert len(plan(131072, 2304, 768, 132)) > 54
    assert plan(131072, 768, 768, 132) is None  # 18: the pieces' own cost would be a tenth
    assert plan(32768, 1024, 256, 132) is None


@triton
def test_the_operator_of_weight_gradients_is_the_product():
    pytest.importorskip("triton.tools.tensor_descriptor")
    from nanochat_hf.kernels.lib.weight_gradient import weight_gradient

    wide, narrow = randoms((256, 5120 if HALF else 80), (256, 1280 if HALF else 48))
    for g, x in ((wide, narrow), (narrow, wide)):
        got, expected = weight_gradient(g, x, torch.float32), g.float().mT @ x.float()
        assert got.dtype == torch.float32 and relative(got, expected) < TOLERANCE


def test_the_stream_and_a_product():
    """LinearPlus: by cuDNN on Hopper, elsewhere by torch."""
    y, weight, stream, slope = randoms((2, 70, 64), (48, 64), (2, 70, 48), (2, 70, 48))
    runs = []
    for function in (LinearPlus.apply, lambda y, w, x: x + F.linear(y, w)):
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
    assert cudnn_products.plan_of("slope", dy.device, dtype, N, C, 4 * C) and cudnn_products.plan_of(
        "sum", dy.device, dtype, N, C, C
    )
    assert relative(cudnn_products.slope(dy, down, kept), (dy.float() @ down.float()) * 2 * kept.float().sqrt()) < 5e-3
    weight = down[:, :C].contiguous()
    assert (
        relative(cudnn_products.product_plus(dy, weight, stream), dy.float() @ weight.float().mT + stream.float())
        < 5e-3
    )


@pytest.mark.parametrize("shape", [(5120, 1280), (1280, 5120)] if HALF else [(80, 48)])
def test_the_operator_adds_the_product(shape):
    g, x = randoms((256, shape[0]), (256, shape[1]))
    expected = g.float().mT @ x.float()
    total = torch.ones_like(expected)
    weights.add_weight_gradient(total, g, x)
    assert relative(total - 1, expected) < 1e-5
