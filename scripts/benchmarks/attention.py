"""Attention of one layer, way by way.

python -m scripts.bench attention [--rows 32 --positions 2048 --heads 6 --window 1024 --document 512]

Forward and backward in ms, each with and without a window and documents. The error of the output and of dq, dk, dv is
‖ours − formula‖ / ‖formula‖ in float32, on the first rows. SDPA would need a mask for a window or documents, so it runs
for plain causal rows only.
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from nanochat_hf.kernels.lib import cudnn_attention
from scripts.benchmarks.measure import median_ms, report

CHECKED = 2  # rows that are compared with the formula: its weights are float32 (rows, H, T, T)


def borders_of(rows, positions, document, device):
    """Borders of documents of about `document` tokens among all tokens, int32; each row begins one."""
    starts = torch.rand(rows, positions, generator=torch.Generator().manual_seed(0)) < 1 / document
    starts[:, 0] = True
    return F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=rows * positions).int().to(device)


def formula(q, k, v, borders, window):
    """Attention in float32: q (B, T, H, D), k and v (B, T, K, D) → (B, T, H, D)."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    mask = cudnn_attention.packed_mask(q.shape[:2], borders, window, q.device)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def flex(device):
    """FlexAttention: compiled on CUDA, as it stands elsewhere (forward alone: torch has no backward there)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    run = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention

    def prepare(q, borders, window):
        B, T = q.shape[:2]
        number = None
        if borders is not None:
            number = torch.bucketize(torch.arange(B * T, device=device), borders.long(), right=True).view(B, T)

        def seen(b, h, i, j):
            mask = i >= j
            if window:
                mask = mask & (i - j < window)
            return mask if number is None else mask & (number[b, i] == number[b, j])

        blocks = create_block_mask(seen, B if borders is not None else None, None, T, T, device=device)
        return lambda q, k, v: run(
            *(t.transpose(1, 2) for t in (q, k, v)), block_mask=blocks, enable_gqa=q.shape[2] != k.shape[2]
        ).transpose(1, 2)

    return prepare


def sdpa(q, borders, window):
    """PyTorch's SDPA for plain causal rows; None for the other cases."""
    if borders is not None or window:
        return None
    return lambda q, k, v: F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
    ).transpose(1, 2)


def cudnn(q, borders, window):
    """The attention of cuDNN; RuntimeError that says what is missing if it cannot run."""
    missing = cudnn_attention.missing(q.device)
    if missing:
        raise RuntimeError("; ".join(missing))
    return lambda q, k, v: torch.ops.nanochat_hf.cudnn_attention(q, k, v, borders, q.shape[-1] ** -0.5, window)[0]


def measure(prepare, tensors, borders, window, wanted, args):
    """Figures of one way; None if it is not for this case."""
    (q, k, v, slope), device = tensors, tensors[0].device
    function = prepare(q, borders, window)
    if function is None:
        return None
    learns = device.type == "cuda" or prepare is not args.flex
    # forward is timed with gradients too: that is training's, and so it is compiled only once
    inputs = [t.detach().requires_grad_(learns) for t in (q, k, v)]
    timing = dict(repeats=args.repeats, inner=args.inner)
    out, backward = function(*inputs), float("nan")
    results = [out.detach()]
    forward = median_ms(lambda: function(*inputs), device, **timing)
    if learns:
        results += torch.autograd.grad(out, inputs, slope, retain_graph=True)
        backward = median_ms(lambda: torch.autograd.grad(out, inputs, slope, retain_graph=True), device, **timing)
    strayed = [((a[:CHECKED].float() - b).norm() / b.norm()).item() for a, b in zip(results, wanted, strict=False)]
    strayed += [float("nan")] * (4 - len(strayed))
    return {
        "forward ms": forward,
        "backward ms": backward,
        **dict(zip(("out", "dq", "dk", "dv"), strayed, strict=True)),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench attention", description=__doc__)
    small = not torch.cuda.is_available()
    parser.add_argument("--rows", type=int, default=2 if small else 32, help="rows of a batch")
    parser.add_argument("--positions", type=int, default=128 if small else 2048, help="tokens of a row")
    parser.add_argument("--heads", type=int, default=6, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=6, help="key/value heads")
    parser.add_argument("--head-dim", type=int, default=128, help="channels of a head")
    parser.add_argument(
        "--window", type=int, default=64 if small else 1024, help="keys that a query sees in the cases with a window"
    )
    parser.add_argument(
        "--document",
        type=int,
        default=32 if small else 512,
        help="mean tokens of a document in the cases with documents",
    )
    parser.add_argument("--repeats", type=int, default=5, help="timings, of which the median counts")
    parser.add_argument("--inner", type=int, default=1 if small else 10, help="calls in a timing")
    parser.add_argument("--json", help="also write the figures there")
    args = parser.parse_args(argv)
    device = torch.device("cpu" if small else "cuda")
    generator = torch.Generator(device).manual_seed(0)
    shapes = [
        (args.rows, args.positions, heads, args.head_dim)
        for heads in (args.heads, args.kv_heads, args.kv_heads, args.heads)
    ]
    tensors = [torch.randn(shape, generator=generator, device=device).bfloat16() for shape in shapes]
    args.flex = flex(device)
    ways, rows = {"FlexAttention": args.flex, "SDPA": sdpa, "cuDNN": cudnn}, []
    packed = borders_of(args.rows, args.positions, args.document, device)
    for window in (0, args.window):
        for borders in (None, packed):
            first = (
                None if borders is None else borders[: int((borders <= min(CHECKED, args.rows) * args.positions).sum())]
            )
            inputs = [t[:CHECKED].float().requires_grad_() for t in tensors[:3]]
            exact = formula(*inputs, first, window)
            wanted = [exact.detach(), *torch.autograd.grad(exact, inputs, tensors[3][:CHECKED].float())]
            del exact
            for name, prepare in ways.items():
                case = {"way": name, "window": window, "documents": 0 if borders is None else len(borders) - 1}
                try:
                    figures = measure(prepare, tensors, borders, window, wanted, args)
                except Exception as error:  # the others shall still be measured
                    print(f"{case}: {type(error).__name__}: {str(error)[:2000]}", flush=True)
                    continue
                rows += [case | figures] if figures else []
    report(rows, args.json)


if __name__ == "__main__":
    main()
