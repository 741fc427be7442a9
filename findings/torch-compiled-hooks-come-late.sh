#!/usr/bin/env bash
# torch: in a compiled model every gradient hook fires after the whole backward pass, and in no order of use.
#
# Expected: `register_post_accumulate_grad_hook` runs when its gradient is complete: last layer first, each before
#   the backward pass of the layer below.
# Seen: so in eager mode. Under torch.compile all bodies of backward run first and all hooks after them, in an order
#   that is not that of backward. The body of a custom operator does run at its true place.
# Matters: these hooks are how one steps the optimizer during backward (to free gradients early) or starts the
#   communication of a layer while others still compute. Compiled, they save no memory and hide no transfer,
#   silently. What must run in between belongs into a custom operator.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu
#   eager: backward 3, hook 3, backward 2, hook 2, backward 1, hook 1, backward 0, hook 0
#   aot_eager: backward 3, backward 2, backward 1, backward 0, hook 0, hook 2, hook 1, hook 3
set -euo pipefail
packages=(torch==2.13.0 numpy==2.4.6)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV_CACHE:-$work}/$(printf '%s' "${packages[*]}" | cksum | cut -d ' ' -f 1)
[ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
cd "$work"
cat > check.py <<'EOF'
import sys

import torch
from torch import nn

events = []


@torch.library.custom_op("finding::product", mutates_args=())
def product(x: torch.Tensor, weight: torch.Tensor, layer: int) -> torch.Tensor:
    return x @ weight.t()


@product.register_fake
def _(x, weight, layer):
    return x @ weight.t()


@torch.library.custom_op("finding::product_backward", mutates_args=())
def product_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    events.append(f"backward {layer}")
    return grad @ weight, grad.t() @ x


@product_backward.register_fake
def _(grad, x, weight, layer):
    return grad @ weight, grad.t() @ x


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.layer = inputs[2]


def backward(ctx, grad):
    return *product_backward(grad.contiguous(), *ctx.saved_tensors, ctx.layer), None


product.register_autograd(backward, setup_context=keep)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(8, 8) / 3) for _ in range(4)])

    def forward(self, x):
        for layer, weight in enumerate(self.weights):
            x = product(x, weight, layer).relu()
        return x.sum()


def run(backend):
    torch.manual_seed(0)
    events.clear()
    model = Model()
    for layer, weight in enumerate(model.weights):
        weight.register_post_accumulate_grad_hook(lambda _, layer=layer: events.append(f"hook {layer}"))
    forward = torch.compile(model, backend=backend) if backend else model
    forward(torch.randn(2, 8)).backward()
    print(f"{backend or 'eager'}: {', '.join(events)}")
    return list(events)


print("torch", torch.__version__)
# The default backend, inductor, gives the same order; it needs a C++ compiler.
eager, compiled = run(None), run("aot_eager")
in_turn = [f"{what} {layer}" for layer in (3, 2, 1, 0) for what in ("backward", "hook")]
late = compiled[:4] == in_turn[::2] and all(event.startswith("hook") for event in compiled[4:])
sys.exit(0 if eager == in_turn and late and compiled[4:] != in_turn[1::2] else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
