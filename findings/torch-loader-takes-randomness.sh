#!/usr/bin/env bash
# torch: iterating over a DataLoader that neither shuffles nor has workers draws from the global random numbers.
#
# Expected: a loader that goes through its data in order uses no randomness.
# Seen: each `iter(loader)` takes a seed for workers from the default generator, even with `num_workers=0`. All
#   later dropout masks, samples and initial values are others.
# Matters: how often one evaluates changes what is trained. Two runs with one seed that differ only in `eval_every`
#   part after the first evaluation, and an ablation of it measures noise. A loader with a `generator` of its own
#   takes its seed from there.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu
#   same seed, evaluated every 2 or every 10 steps: weights differ by 0.0187 (relative norm)
#   the same with a generator of the loader's own: equal to the bit: True
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
from torch.utils.data import DataLoader


def train(evaluate_every, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Dropout(0.5), torch.nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    inputs = torch.ones(16, 8)
    held_out = DataLoader([torch.zeros(8)] * 4, **options)
    for step in range(20):
        if step % evaluate_every == 0:
            model.eval()
            with torch.no_grad():
                for batch in held_out:
                    model(batch)
            model.train()
        (model(inputs) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


print("torch", torch.__version__)
often, seldom = train(2), train(10)
apart = ((often - seldom).norm() / seldom.norm()).item()
print(f"same seed, evaluated every 2 or every 10 steps: weights differ by {apart:.4f} (relative norm)")
own = torch.equal(train(2, generator=torch.Generator()), train(10, generator=torch.Generator()))
print("the same with a generator of the loader's own: equal to the bit:", own)
sys.exit(0 if apart > 0.001 and own else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
