"""Attention by cuDNN beside its formula, for tests with the real graphs and with those of cudnn_stand_in.py."""

import torch

from nanochat_hf.kernels.lib import cudnn_attention
from tests.support.models import build


def model_of(**changes):
    model = build(**changes)
    model.set_attn_implementation(cudnn_attention.register())
    return model


def eager(**changes):
    return build(attn_implementation="eager", **changes)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def learned(model, ids, call=None, **inputs):
    """Logits, and the gradients of a loss."""
    logits = model(ids, **inputs).logits
    loss = (model.train() if call is None else call)(ids, labels=ids, **inputs).loss
    return logits, torch.autograd.grad(loss, list(model.parameters()))


def plain(q, k, v, mask):
    """Attention by its formula: q (B, T, H, D), k and v (B, T, K, D), mask (B or 1, 1, T, T) → (B, T, H, D)."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def inputs(B, T, H, K, D, device="cpu", dtype=torch.float32, borders=None):
    """q, k, v and a slope of the output, and the borders of documents as a tensor."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = [torch.randn(B, T, heads, D, generator=generator, device=device).to(dtype) for heads in (H, K, K, H)]
    return *tensors, None if borders is None else torch.tensor(borders, dtype=torch.int32, device=device)


def both(q, k, v, do, borders, window):
    """(out, dq, dk, dv) of the operator and of the formula in float32."""
    results = []
    for kernel in (True, False):
        tensors = [
            t.detach().clone(memory_format=torch.preserve_format) if kernel else t.detach().float() for t in (q, k, v)
        ]
        tensors = [t.requires_grad_() for t in tensors]
        if kernel:
            out, _ = torch.ops.nanochat_hf.cudnn_attention(*tensors, borders, q.shape[-1] ** -0.5, window)
        else:
            out = plain(*tensors, cudnn_attention.packed_mask(q.shape[:2], borders, window, q.device))
        results.append((out.detach(), *torch.autograd.grad(out, tensors, do if kernel else do.float())))
    return zip(*results, strict=True)
