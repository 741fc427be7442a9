#!/usr/bin/env bash
# torch: with one autocast region around several optimizer steps, forward never sees the new weights.
#
# Expected: autocast decides the dtype of each operation; where the region begins and ends makes no difference.
# Seen: the optimizer moves the weights, yet the loss stays the same to the last bit, without an error or a warning,
#   until the outermost region ends. Autocast keeps the half-precision copy of each float32 parameter until then,
#   and a step in place does not make the copy invalid.
# Matters: several updates on one batch (PPO epochs, test-time training, a closure for LBFGS) are easily written
#   inside one `with`. A helper that opens autocast again inside does not help: only the outermost region counts.
#   `cache_enabled=False`, or a region per forward, is right.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu
#   a region per step:      [4.9649, 3.1769, 2.0801, 1.3929, 0.9531]
#   one region, five steps: [4.9649, 4.9649, 4.9649, 4.9649, 4.9649]
#     the weights moved by 2.24 meanwhile; after the region the loss is 0.42
#   one region, no cache:   [4.9649, 3.1769, 2.0801, 1.3929, 0.9531]
set -euo pipefail
packages=(torch==2.13.0 numpy==2.4.6)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV_CACHE:-$work}/$(printf '%s' "${packages[*]}" | cksum | cut -d ' ' -f 1)
[ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
cd "$work"
cat > check.py <<'EOF'
import contextlib
import sys

import torch

torch.manual_seed(0)
inputs = torch.randn(64, 8)
targets = inputs @ torch.randn(8, 1)


def half(**options):
    return torch.autocast("cpu", torch.bfloat16, **options)


def train(around, each):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with around():
        for _ in range(5):
            with each():
                loss = (model(inputs).float() - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(round(loss.item(), 4))
    with half():
        after = (model(inputs).float() - targets).square().mean().item()
    return losses, (model.weight - before).norm().item(), after


print("torch", torch.__version__)
right, _, _ = train(contextlib.nullcontext, half)
stale, moved, after = train(half, half)
uncached, _, _ = train(lambda: half(cache_enabled=False), lambda: half(cache_enabled=False))
print("a region per step:     ", right)
print(f"one region, five steps: {stale}")
print(f"  the weights moved by {moved:.2f} meanwhile; after the region the loss is {after:.2f}")
print("one region, no cache:  ", uncached)
sys.exit(0 if len(set(stale)) == 1 and moved > 1 and uncached == right and right[4] < right[0] / 2 else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
