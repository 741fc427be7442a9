"""Parts of a layer in float8 beside bfloat16, one GPU.

python -m scripts.bench float8 --width 1280 [--tokens 65536]
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from nanochat_hf.kernels.float8 import layers as float8_layers
from nanochat_hf.kernels.float8 import products as float8
from nanochat_hf.kernels.ops.squared_relu import SquaredReluMLP
from scripts.benchmarks.measure import median_ms, report

E4M3, E5M2 = float8.E4M3, float8.E5M2


def products(N, C, device):
    """The products of a layer, as operands of random numbers → [(name, function, FLOPs)]."""
    one, rows = torch.ones((), device=device), []
    random = torch.randn(max(N, 4 * C), 4 * C, device=device, dtype=torch.bfloat16)
    for name, (m, n, k), a_dtype, dtype in (
        ("q, k, v in one", (N, 3 * C, C), E4M3, torch.bfloat16),
        ("its dx", (N, C, 3 * C), E5M2, torch.bfloat16),
        ("its dw", (3 * C, C, N), E5M2, torch.float32),
        ("up", (N, 4 * C, C), E4M3, torch.bfloat16),
        ("down", (N, C, 4 * C), E4M3, torch.bfloat16),
        ("dw of up", (4 * C, C, N), E5M2, torch.float32),
    ):
        a, b = (random.flatten()[: rows_ * k].view(rows_, k) for rows_ in (m, n))
        a8, b8 = a.to(a_dtype), b.to(E4M3)
        rows.append((f"{name}, bfloat16", lambda a=a, b=b: a @ b.t(), 2 * m * n * k))
        for fast in (True, False):
            call = lambda a=a8, b=b8, dtype=dtype, fast=fast: float8.product(a, b, (one, one), dtype, fast)  # noqa: E731
            rows.append((f"{name}, float8{', fast' if fast else ''}", call, 2 * m * n * k))
    return rows


def casts(N, C, device):
    """Casts of an activation → [(name, function, bytes)]."""
    x, one, largest = (
        torch.randn(N, C, device=device, dtype=torch.bfloat16),
        torch.ones((), device=device),
        torch.compile(float8.largest),
    )
    x8 = x.to(E4M3)
    return [
        ("largest, compiled", lambda: largest(x), 2 * N * C),
        ("cast to both layouts", lambda: float8.cast([x], one, E5M2, 1), 4 * N * C),
        ("transpose", lambda: float8.transposed(x8), 2 * N * C),
    ]


def inside(N, C, device):
    """The wide products with squared ReLU or its slope, in one kernel and in two: [(name, function, FLOPs)]."""
    one, rows = torch.ones((), device=device), []
    x, up = torch.randn(N, C, device=device).to(E4M3), torch.randn(4 * C, C, device=device).to(E4M3)
    g, unit = x.to(torch.bfloat16).to(E5M2), torch.full((), 10.0 * C, device=device)
    a_t = float8.squared_relu(x, up, one, one, unit)[1]
    for switch in (True, False):

        def run(function, *operands, switch=switch):
            float8.INSIDE = switch
            function(*operands)
            float8.INSIDE = True

        how = "in one kernel" if switch else "product, then cast"
        rows.append(
            (f"squared ReLU, {how}", lambda run=run: run(float8.squared_relu, x, up, one, one, unit), 8 * N * C * C)
        )
        rows.append(
            (f"slope, {how}", lambda run=run: run(float8.slope, g, up, one, one, a_t, unit, unit), 8 * N * C * C)
        )
    return rows


def parts(N, C, device):
    """Norm and part, compiled, forward and backward, in both precisions → [(name, function, FLOPs)]."""
    x = torch.randn(1, N, C, device=device, dtype=torch.bfloat16, requires_grad=True)
    weights = [
        torch.randn(shape, device=device).mul_(C**-0.5).requires_grad_()
        for shape in ((C, C), (C, C), (C, C), (4 * C, C), (C, 4 * C))
    ]
    rows = []

    def normed(function):
        def part(x, *weights):
            outputs = function(F.rms_norm(x, (C,)), *weights)
            return torch.cat(outputs, -1) if isinstance(outputs, tuple) else outputs

        return torch.compile(part, dynamic=False)

    def plain(x, q, k, v):
        return F.linear(x, torch.cat((q, k))), F.linear(x, v)

    for name, functions, own, units in (
        ("q, k, v", (plain, lambda *t: float8_layers.Projections.apply(*t)), weights[:3], 18),
        ("o_proj", (F.linear, lambda *t: float8_layers.Linear.apply(*t)), weights[:1], 6),
        (
            "MLP",
            (lambda *t: SquaredReluMLP.apply(*t), lambda *t: float8_layers.SquaredReluMLP.apply(*t)),
            weights[3:],
            48,
        ),
    ):
        for precision, function in zip(("bfloat16", "float8"), functions, strict=True):
            call = normed(function)
            g = torch.randn(1, N, C * (3 if len(own) == 3 else 1), device=device, dtype=torch.bfloat16) / N

            def run(call=call, own=own, g=g):
                with torch.autocast(device.type, torch.bfloat16):
                    y = call(x, *own)
                y.backward(g.to(y.dtype))
                x.grad = None
                for weight in own:
                    weight.grad = None

            rows.append((f"norm and {name}, both ways, {precision}", run, units * N * C * C))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench float8", description=__doc__)
    parser.add_argument("--tokens", type=int, default=65536, help="of a micro-batch")
    parser.add_argument("--width", type=int, default=1280, help="hidden_size")
    parser.add_argument("--json", help="also write the figures there")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    N, C, rows = args.tokens, args.width, []
    for name, function, flops in [*products(N, C, device), *inside(N, C, device), *parts(N, C, device)]:
        ms = median_ms(function, device, inner=5)
        rows.append({"part": name, "ms": ms, "TFLOP/s": flops / ms / 1e9, "TB/s": float("nan")})
    for name, function, size in casts(N, C, device):
        ms = median_ms(function, device, inner=5)
        rows.append({"part": name, "ms": ms, "TFLOP/s": float("nan"), "TB/s": size / ms / 1e9})
    report(rows, args.json)


if __name__ == "__main__":
    main()
