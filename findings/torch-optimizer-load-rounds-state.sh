#!/usr/bin/env bash
# torch: `Optimizer.load_state_dict` rounds an optimizer's float32 state to the dtype of bfloat16 parameters.
#
# Expected: loading a state gives back what was saved.
# Seen: every floating-point tensor of the state, but for the key `step`, is cast to its parameter's dtype.
#   Optimizers that keep float32 moments beside bfloat16 weights on purpose, such as transformers' Adafactor, go on
#   with moments of 8 bits after a resume, and nothing says so.
# Matters: a resumed run is not the run that was stopped. Moments with a decay near one are what bfloat16 cannot
#   hold, and a custom state (a count of tokens, a running mean) is rounded too unless it is called `step`. An
#   optimizer with states of its own has to override `load_state_dict`.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu transformers 5.23.0
#   second moments of rows: saved as torch.float32, loaded as torch.bfloat16
#   largest relative change by loading: 0.0035
set -euo pipefail
packages=(torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 accelerate==1.15.0 numpy==2.4.6)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV_CACHE:-$work}/$(printf '%s' "${packages[*]}" | cksum | cut -d ' ' -f 1)
[ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cat > check.py <<'EOF'
import copy
import sys

import torch
import transformers
from transformers.optimization import Adafactor


def optimizer_of(weight):
    return Adafactor([weight], lr=1e-2, relative_step=False, scale_parameter=False)


torch.manual_seed(0)
weight = torch.nn.Parameter(torch.randn(64, 64).bfloat16())
optimizer = optimizer_of(weight)
for _ in range(5):
    weight.grad = torch.randn(64, 64).bfloat16()
    optimizer.step()
saved = copy.deepcopy(optimizer.state_dict())
resumed = optimizer_of(weight)
resumed.load_state_dict(saved)

print("torch", torch.__version__, "transformers", transformers.__version__)
kept, got = saved["state"][0]["exp_avg_sq_row"], resumed.state[weight]["exp_avg_sq_row"]
error = ((kept - got.float()).abs() / kept).max().item()
print(f"second moments of rows: saved as {kept.dtype}, loaded as {got.dtype}")
print(f"largest relative change by loading: {error:.4f}")
sys.exit(0 if kept.dtype == torch.float32 and got.dtype == torch.bfloat16 and error > 1e-3 else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
