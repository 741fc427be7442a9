"""Arguments on which kernels and formulas are compared: CASES[operation] is a list of functions that make a Case.

Letters as in the model: B rows, T positions, C hidden_size, H query heads, K key/value heads, D head_dim, V vocabulary.
"""

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from nanochat_hf.kernels.lib.cudnn_attention import NAME, packed_mask
from nanochat_hf.model.ops_nanochat_hf import PLAIN, Attend, Heads, ValueEmbedding, norm
from tests.support.kernels import DEVICE, HALF, KIND


@dataclass
class Case:
    """One call of an operation: its arguments, and those tensors and layers among them that have gradients."""

    args: tuple
    tensors: tuple = ()
    layers: dict = field(default_factory=dict)  # {name as in SUMMED: layer}
    in_place: tuple = ()  # tensors that the call changes, as part of its result


def random(*shape, seed, dtype=None, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype or KIND)


def leaf(*shape, seed, scale=1.0):
    return random(*shape, seed=seed, scale=scale).requires_grad_()


def linear(inputs, outputs, seed):
    layer = nn.Linear(inputs, outputs, bias=False, device=DEVICE)
    layer.weight.data = random(outputs, inputs, seed=seed, dtype=torch.float32, scale=inputs**-0.5)
    return layer


def normed(*shape, seed):
    return norm(random(*shape, seed=seed)).detach().requires_grad_()


def angles(rows, positions, head_dim):
    return PLAIN.rope_tables(torch.arange(positions, device=DEVICE).expand(rows, -1), head_dim, 10000.0, True)


def rope_tables(rounded):
    return lambda: Case((torch.arange(70, device=DEVICE).view(2, 35), 64, 10000.0, rounded))


def mix_and_norm(resid, channels):
    def make():
        # more rows than programs on a GPU, so that each takes some; C is no power of two
        shape = (3, 700 if HALF else 5, 96)
        tensors = [leaf(*shape, seed=seed) for seed in range(3)]
        lambdas = torch.tensor([resid, -0.3], device=DEVICE).requires_grad_()
        return Case((*tensors, lambdas, 1e-7, channels), (*tensors, lambdas))

    return make


def stream_and_norm():
    x = leaf(3, 700 if HALF else 5, 96, seed=0)
    return Case((x, 1e-7), (x,))


def projections(counts, head_dim, width=64, positions=64):
    q, k, v = (linear(width, count * head_dim, seed) for seed, count in enumerate(counts, 1))
    return Heads(q, k, v, head_dim, None), dict(q_proj=q, k_proj=k, v_proj=v)


def queries_keys_values(counts, head_dim, rows):
    def make():
        x = normed(2, 64, 64, seed=0)
        heads, layers = projections(counts, head_dim)
        return Case((x, heads, angles(rows, 64, head_dim)), (x,), layers)

    return make


def values(heads, head_dim, positions, ids):
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(500 if ids == "few" else 40, (2, positions), generator=generator)
    if ids == "one":
        index[:] = 7
    elif ids == "long":  # more tokens than a program takes
        index[1, 10:], index[0, 40:60] = 3, 3
    table = nn.Embedding(500, heads * head_dim, device=DEVICE)
    table.weight.data = random(500, heads * head_dim, seed=9, dtype=torch.float32)
    gate = torch.rand(2, positions, heads, generator=generator).to(DEVICE, KIND).requires_grad_()
    return ValueEmbedding(gate, table, index.to(DEVICE))


def gated_rows(ids):
    def make():
        value = values(3, 32, 170, ids)
        return Case(tuple(value), (value.gate,), dict(value_embeds=value.table))

    return make


def attention(packed, counts, with_values):
    """With (6, 2, 2) heads of 64 the values begin with a tile of the product, with (4, 2, 2) they do not."""

    def make():
        head_dim, window, positions = 64, 24, 128
        borders = torch.tensor([0, 40, 128, 200, 256], dtype=torch.int32, device=DEVICE) if packed else None
        mask = packed_mask((2, positions), borders, window, torch.device(DEVICE))

        def call(q, k, v):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2), None

        x = normed(2, positions, 64, seed=0)
        heads, layers = projections(counts, head_dim)
        value = values(counts[2], head_dim, positions, "all") if with_values else None
        tensors = (x, value.gate) if with_values else (x,)
        layers |= dict(value_embeds=value.table) if with_values else {}
        attend = Attend(call, NAME, True, head_dim**-0.5, window, borders)
        return Case((PLAIN, x, heads, value, angles(1, positions, head_dim), attend), tensors, layers)

    return make


def project_and_add():
    y, stream = leaf(2, 64, 64, seed=0), leaf(2, 64, 48, seed=1)
    o_proj = linear(64, 48, 2)
    return Case((y, o_proj, stream), (y, stream), dict(o_proj=o_proj))


def squared_relu_mlp(width):
    def make():
        x = normed(2, 40, width, seed=0)
        up, down = linear(width, 4 * width, 1), linear(4 * width, width, 2)
        return Case((x, up, down), (x,), dict(up_proj=up, down_proj=down))

    return make


def nll_and_slope(vocab):
    def make():
        logits = random(9, vocab, seed=0, scale=20)
        target = torch.randint(vocab, (9,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        target[3] = -100
        weight = random(9, seed=2, dtype=torch.float32).abs()
        return Case((logits, target, weight, 15.0))

    return make


def add_product():
    total = random(48, 80, seed=0, dtype=torch.float32)
    return Case((total, random(64, 48, seed=1).mT, random(64, 80, seed=2)), in_place=(total,))


CASES = {
    "rope_tables": [rope_tables(True), rope_tables(False)],
    "mix_and_norm": [mix_and_norm(resid, channels) for resid in (0.9, -0.3, 0.2, 0.0) for channels in (0, 12, 32)],
    "stream_and_norm": [stream_and_norm],
    "queries_keys_values": [
        queries_keys_values(counts, head_dim, rows)
        # tiles of one product within q, k and v, and across them
        for counts, head_dim, rows in (((2, 2, 2), 128, 1), ((3, 1, 1), 128, 2), ((3, 2, 2), 64, 1), ((6, 2, 2), 32, 2))
    ],
    "gated_rows": [gated_rows(ids) for ids in ("all", "few", "one", "long")],
    "attention": [
        attention(packed, counts, with_values)
        for packed in (True, False)
        for counts, with_values in (((4, 2, 2), False), ((4, 2, 2), True), ((6, 2, 2), True))
    ],
    "project_and_add": [project_and_add],
    "squared_relu_mlp": [squared_relu_mlp(width) for width in (64, 96)],
    "nll_and_slope": [nll_and_slope(vocab) for vocab in (300, 5000, 16384, 40000)],
    "add_product": [add_product],
}


def in_float64(case: Case) -> Case:
    """The same call with every tensor and layer in float64, and leaves of its own."""
    copies = {}

    def doubled(value):
        if id(value) in copies:
            return copies[id(value)]
        if isinstance(value, torch.Tensor):
            made = value.detach().double() if value.is_floating_point() else value
            made = made.requires_grad_(value.requires_grad)
        elif isinstance(value, nn.Module):
            made = copy.deepcopy(value).double()
        elif isinstance(value, tuple):
            made = type(value)(*map(doubled, value)) if hasattr(value, "_fields") else tuple(map(doubled, value))
        else:
            made = value
        copies[id(value)] = made
        return made

    layers = {name: doubled(layer) for name, layer in case.layers.items()}
    return Case(doubled(case.args), doubled(case.tensors), layers, doubled(case.in_place))
