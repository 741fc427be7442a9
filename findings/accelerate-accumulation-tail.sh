#!/usr/bin/env bash
# accelerate: the last update of an epoch is too small if the number of batches is not a multiple of the
# accumulation.
#
# Expected: `accumulate()` updates at the end of the loader by the mean of the batches that are there.
# Seen: it does update there, but `backward` has divided each loss by the full number of accumulation steps. With 6
#   batches and 4 steps the second update is the mean of 2 batches times 2/4.
# Matters: under SGD and Muon without normalisation the last batches of each epoch count less, under clipping they
#   escape it, and a logged gradient norm dips once an epoch. Drop the rest, or
#   `GradientAccumulationPlugin(sync_with_dataloader=False)`, which carries it over into the next epoch.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu accelerate 1.15.0
#   6 batches of gradient 1, 4 accumulated, SGD at lr 1: the updates are [1.0, 0.5]
set -euo pipefail
packages=(torch==2.13.0 accelerate==1.15.0 numpy==2.4.6)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV_CACHE:-$work}/$(printf '%s' "${packages[*]}" | cksum | cut -d ' ' -f 1)
[ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cat > check.py <<'EOF'
import sys

import accelerate
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

print("torch", torch.__version__, "accelerate", accelerate.__version__)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
model = torch.nn.Linear(1, 1, bias=False)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
loader = DataLoader([torch.ones(1)] * 6, batch_size=1)  # the gradient of each batch is 1
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
before, moved = model.weight.item(), []
for batch in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(batch).sum())
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        moved.append(round(before - model.weight.item(), 4))
        before = model.weight.item()
print("6 batches of gradient 1, 4 accumulated, SGD at lr 1: the updates are", moved)
sys.exit(0 if moved == [1.0, 0.5] else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
