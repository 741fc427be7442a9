"""Kernels of a whole layer against the plain formulas: the stream and its norm, q, k and v by one product, cuDNN's attention upon them.
On a GPU, or by Triton's interpreter where triton is installed without one."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from nanochat_hf import kernels
from nanochat_hf.kernels import cudnn_attention, cudnn_graph
from nanochat_hf.model.modeling_nanochat_hf import norm, rotate
from tests.kernels.test_kernels import DEVICE, batch, compiled, gradients, relative, tiny
from tests.support import cudnn_stand_in

triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
HALF = DEVICE == "cuda"  # the products are for half precision there, the interpreter's for float32
KIND, TOLERANCE = (torch.bfloat16, 1e-2) if HALF else (torch.float32, 1e-5)


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


def alike(ours, plain, tolerance=TOLERANCE):
    errors = [relative(a.float(), b.float()) for a, b in zip(ours, plain, strict=True)]
    assert max(errors) < tolerance, errors


@triton
@pytest.mark.parametrize("channels", [0, 32])
@pytest.mark.parametrize("resid", [0.9, -0.3, 0.2, 0.0])  # on both sides of what decides whether x is kept
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_stream_and_its_norm(dtype, tolerance, resid, channels):
    from nanochat_hf.kernels.stream import MixAndNorm

    generator = torch.Generator().manual_seed(0)
    # more rows than programs on an H100, so that each takes some; C no power of two
    tensors = [torch.randn(3, 700 if HALF else 5, 96, generator=generator).to(DEVICE, dtype) for _ in range(6)]
    slope = torch.randn(*tensors[0].shape[:-1], channels, generator=generator).to(DEVICE, dtype)
    scalars = [torch.tensor(value, device=DEVICE) for value in (resid, -0.3)]
    ours, plain = leaves(*tensors[:3], *scalars), leaves(*(t.float() for t in tensors[:3]), *scalars)
    stream, normed, first, x0 = MixAndNorm.apply(*ours, 1e-7, channels)
    torch.autograd.backward((stream, normed, first, x0), (*tensors[3:5], slope, tensors[5]))
    x = plain[0] + plain[1]
    mixed = plain[3] * x + plain[4] * plain[2]
    mixed.retain_grad()
    expected = mixed, norm(mixed, 1e-7)
    torch.autograd.backward((*expected, expected[1][..., :channels], plain[2]), [t.float() for t in (*tensors[3:5], slope, tensors[5])])
    assert torch.equal(x0, tensors[2]) and torch.equal(first, normed[..., :channels])
    skip = 0 if resid else 2  # then those of stream and update are zeros
    alike((stream, normed, *(t.grad for t in ours[skip:3])), (*expected, *(t.grad for t in plain[skip:3])), tolerance)
    assert resid or not any(t.grad.any() for t in ours[:2])
    terms = mixed.grad * x, mixed.grad * plain[2]  # whose sums the scalars' gradients are, and cancel
    assert all((a.grad - b.grad).abs() < tolerance * t.norm() for a, b, t in zip(ours[3:], plain[3:], terms, strict=True))


@triton
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_stream_handed_on_and_its_norm(dtype, tolerance):
    from nanochat_hf.kernels.stream import StreamAndNorm

    generator = torch.Generator().manual_seed(0)
    x, *slopes = (torch.randn(3, 700 if HALF else 5, 96, generator=generator).to(DEVICE, dtype) for _ in range(3))
    (ours,), (plain,) = leaves(x), leaves(x.float())
    stream, normed = StreamAndNorm.apply(ours, 1e-7)
    torch.autograd.backward((stream, normed), slopes)
    expected = norm(plain, 1e-7)
    torch.autograd.backward((plain, expected), [slope.float() for slope in slopes])
    assert torch.equal(stream, x)
    alike((normed, ours.grad), (expected, plain.grad), tolerance)


def projected(tokens, width, sizes, D, generator, shared=True):
    """x, weights and angles for heads of `sizes`."""
    x = torch.randn(2, tokens, width, generator=generator).to(DEVICE, KIND)
    weights = [torch.randn(heads * D, width, generator=generator).to(DEVICE) / width**0.5 for heads in sizes]
    angle = torch.randn(1 if shared else 2, tokens, 1, D // 2, generator=generator).to(DEVICE)
    return x, weights, torch.stack((angle.cos(), angle.sin())).bfloat16()


def formula(x, q, k, v, rope, D):
    """Float32's q, k and v."""
    cos, sin = rope.float()
    q, k, v = ((x @ weight.to(KIND).float().mT).unflatten(-1, (-1, D)) for weight in (q, k, v))
    return norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin)), v


@triton
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("sizes", "D"), [((2, 2, 2), 128), ((3, 1, 1), 128), ((3, 2, 2), 64), ((6, 2, 2), 32)])  # tiles within and across q, k and v
def test_queries_keys_and_values_by_one_product(sizes, D, shared):
    pytest.importorskip("triton.tools.tensor_descriptor")
    from nanochat_hf.kernels.projections import QueriesKeysValues

    generator = torch.Generator().manual_seed(0)
    x, weights, rope = projected(70, 64, sizes, D, generator, shared)
    slopes = [torch.randn(2, 70, heads, D, generator=generator).to(DEVICE, KIND) for heads in sizes]
    slopes[1] = slopes[1].transpose(1, 2).contiguous().transpose(1, 2)  # as attention kernels hand them back
    ours, plain = leaves(x, *weights), leaves(x.float(), *weights)
    with torch.autocast(DEVICE, KIND, enabled=HALF):
        parts = QueriesKeysValues.apply(*ours, rope, *sizes[:2])
    torch.autograd.backward(parts, slopes)
    expected = formula(*plain, rope, D)
    torch.autograd.backward(expected, [slope.float() for slope in slopes])
    assert all(a.grad.dtype == b.dtype for a, b in zip(ours, (x, *weights), strict=True))
    alike((*parts, *(t.grad for t in ours)), (*expected, *(t.grad for t in plain)))


def plain_attention(q, k, v, borders, window):
    """Attention of packed documents by SDPA under a mask."""
    mask = cudnn_attention.packed_mask(q.shape[:2], borders, window, q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


@triton
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("added", ["nothing", "value", "rows", "rows into a sum"])
def test_attention_upon_one_product(monkeypatch, added, packed):
    """Without a GPU cuDNN's graphs are those of cudnn_stand_in.py, which read and write by address and stride."""
    pytest.importorskip("triton.tools.tensor_descriptor")
    if HALF:
        pytest.importorskip("cudnn")
    else:
        cudnn_graph.graph_of.cache_clear(), cudnn_graph.handle_of.cache_clear()
        monkeypatch.setitem(__import__("sys").modules, "cudnn", cudnn_stand_in.module())
    from nanochat_hf.kernels import projections, value_embedding

    rows = added.startswith("rows")
    generator, D, window, sizes = torch.Generator().manual_seed(0), 64, 24, (6 if rows else 4, 2, 2)
    assert projections.adds(sum(sizes[:2]), D) == rows
    x, weights, rope = projected(128, 64, sizes, D, generator)
    value, slope = (torch.randn(2, 128, heads, D, generator=generator).to(DEVICE, KIND) for heads in (2, sizes[0]))
    borders = torch.tensor([0, 40, 128, 200, 256], dtype=torch.int32, device=DEVICE) if packed else None
    ids = torch.randint(90, (2, 128), generator=generator).to(DEVICE)
    gate, table = torch.rand(2, 128, 2, generator=generator).to(DEVICE, KIND), torch.randn(90, 2 * D, generator=generator).to(DEVICE, KIND)
    more = {"nothing": [], "value": [value]}.get(added, [gate, table])
    ours, plain = leaves(x, *weights, *more), leaves(x.float(), *weights, *(t.float() for t in more))
    total = torch.ones_like(table, dtype=torch.float32) if added == "rows into a sum" else None
    lookup = (*ours[4:], ids, *value_embedding.order_of_ids(ids, 90), total) if rows else ()
    with torch.autocast(DEVICE, KIND, enabled=HALF):
        options = rope, borders, *sizes[:2], D**-0.5, window, None
        out = projections.Attention.apply(*ours[:4], ours[4] if added == "value" else None, *options, *lookup)
    out.backward(slope)
    q, k, v = formula(*plain[:4], rope, D)
    v = v + plain[4].unsqueeze(-1) * F.embedding(ids, plain[5]).unflatten(-1, (2, D)) if rows else v + sum(plain[4:])
    expected = plain_attention(q, k, v, borders, window)
    expected.backward(slope.float())
    if total is not None:
        assert ours[5].grad is None
        ours[5].grad = (total - 1).to(KIND)
    alike((out, *(t.grad for t in ours)), (expected, *(t.grad for t in plain)), 2 * TOLERANCE)


@triton
@pytest.mark.parametrize("compile", [False, True])
def test_a_model_by_the_kernels_of_the_stream_has_its_gradients(compile):
    """All layers: the first without the kernel, value embeddings in every second, x0 handed from layer to layer."""
    model, inputs = tiny(DEVICE), batch(DEVICE)
    loss, plain = gradients(model, inputs)
    kernels.install(model)
    assert model.model.fused_mix is not None
    fused_loss, fused = gradients(model, inputs, compiled(model) if compile else None)
    assert abs(fused_loss - loss) < 1e-5 * loss
    assert max(relative(fused[name], plain[name]) for name in plain) < 1e-4


@triton
def test_where_hidden_states_are_asked_for_the_stream_is_the_formulas():
    model, inputs = tiny(DEVICE), batch(DEVICE)
    plain = model(**inputs, output_hidden_states=True).hidden_states
    kernels.install(model)
    for a, b in zip(model(**inputs, output_hidden_states=True).hidden_states, plain, strict=True):
        assert relative(a, b) < 1e-5
