#!/usr/bin/env bash
# torch: an exponential moving average of bfloat16 weights never moves.
#
# Expected: `AveragedModel` with a decay of 0.999 follows the weights with a delay of some 1,000 steps, a bit
#   coarsely.
# Seen: after 3,000 updates towards 1.5 the average of a weight that began at 1 is 1, to the last bit; in float32 it
#   is 1.475. A step of 0.001 × 0.5 is below half of what bfloat16 can tell apart at 1, so each update is rounded
#   away.
# Matters: the average is a copy of the model and has its dtype. With bfloat16 weights it is the model at the start
#   of averaging, and evaluating it says that averaging does not help. Keep the average in float32.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu
#   torch.float32: weights went from 1 to 1.5, the average after 3,000 updates is 1.4751
#   torch.bfloat16: weights went from 1 to 1.5, the average after 3,000 updates is 1.0000
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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

print("torch", torch.__version__)
seen = {}
for dtype in (torch.float32, torch.bfloat16):
    model = torch.nn.Linear(4, 4, dtype=dtype)
    torch.nn.init.ones_(model.weight)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    average.update_parameters(model)
    torch.nn.init.constant_(model.weight, 1.5)
    for _ in range(3000):
        average.update_parameters(model)
    seen[dtype] = average.module.weight[0, 0].item()
    print(f"{dtype}: weights went from 1 to 1.5, the average after 3,000 updates is {seen[dtype]:.4f}")
sys.exit(0 if seen[torch.bfloat16] == 1.0 and seen[torch.float32] > 1.4 else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
