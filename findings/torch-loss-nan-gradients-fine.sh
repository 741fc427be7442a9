#!/usr/bin/env bash
# torch: a batch without a target has a loss of NaN and gradients of exactly zero; added to a good loss it makes the
# sum NaN and leaves the sum's gradients right.
#
# Expected: cross_entropy's mean over no targets is 0/0, and NaN spreads through the backward pass into all weights.
# Seen: only the number is NaN. Backward passes over ignored positions, so that their gradients are 0, NaN or not.
# Matters: truncated prompts make such batches in fine-tuning. A guard that looks at gradients or their norm sees
#   nothing; one that skips on the loss drops a good accumulated step; and a mean of logged losses is NaN for a run
#   that trains well. Sum the loss and divide by the count of targets, at least 1.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu
#   all labels -100: loss nan, largest gradient 0.0
#   good batch + empty batch: loss nan, gradients equal to the good batch's: True
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
from torch.nn.functional import cross_entropy

print("torch", torch.__version__)
torch.manual_seed(0)
model = nn.Linear(8, 5)
inputs = torch.randn(4, 8)
targets, none = torch.tensor([0, 1, 2, 3]), torch.full((4,), -100)


def gradient(loss):
    model.zero_grad()
    loss.backward()
    return model.weight.grad.clone()


empty = cross_entropy(model(inputs), none)
alone = gradient(empty)
good = gradient(cross_entropy(model(inputs), targets))
summed = cross_entropy(model(inputs), targets) + cross_entropy(model(inputs), none)
both = gradient(summed)
print(f"all labels -100: loss {empty.item()}, largest gradient {alone.abs().max().item()}")
print(f"good batch + empty batch: loss {summed.item()}, gradients equal to the good batch's: {torch.equal(both, good)}")
seen = empty.isnan() and summed.isnan() and not alone.any() and torch.equal(both, good)
sys.exit(0 if seen else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
