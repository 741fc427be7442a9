#!/usr/bin/env bash
# torch: autocast on the CPU runs softmax and norms in bfloat16 where autocast on CUDA runs them in float32.
#
# Expected: one list of operations that stay in float32; the device decides about speed.
# Seen: softmax, log_softmax, layer_norm, rms_norm, sums and cumulative sums are in CUDA's list and not in the
#   CPU's, so on the CPU they keep the bfloat16 that comes out of the product before. The CPU's list has
#   cross_entropy alone of these.
# Matters: a mixed-precision recipe that was tried on the CPU says little about a GPU: attention's probabilities and
#   the residual stream after a norm have 8 bits on one and 24 on the other, so tolerances, loss spikes and
#   comparisons with eager code differ. Put in `.float()` where it counts.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu
#   softmax: autocast has a rule for CUDA True; its result on the CPU is torch.bfloat16
#   log_softmax: autocast has a rule for CUDA True; its result on the CPU is torch.bfloat16
#   layer_norm: autocast has a rule for CUDA True; its result on the CPU is torch.bfloat16
#   rms_norm: autocast has a rule for CUDA True; its result on the CPU is torch.bfloat16
#   sum: autocast has a rule for CUDA True; its result on the CPU is torch.bfloat16
#   cumsum: autocast has a rule for CUDA True; its result on the CPU is torch.bfloat16
#   cross_entropy on the CPU: torch.float32
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
import torch.nn.functional as F

print("torch", torch.__version__)
x = torch.randn(4, 1000).bfloat16()
calls = {
    "softmax": ("softmax.int", lambda: F.softmax(x, dim=-1)),
    "log_softmax": ("log_softmax.int", lambda: F.log_softmax(x, dim=-1)),
    "layer_norm": ("layer_norm", lambda: F.layer_norm(x, (1000,))),
    "rms_norm": ("rms_norm", lambda: F.rms_norm(x, (1000,))),
    "sum": ("sum", lambda: x.sum()),
    "cumsum": ("cumsum", lambda: x.cumsum(dim=-1)),
}
seen = []
for name, (operator, call) in calls.items():
    listed = torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", "AutocastCUDA")
    with torch.autocast("cpu", torch.bfloat16):
        result = call().dtype
    seen.append(listed and result == torch.bfloat16)
    print(f"{name}: autocast has a rule for CUDA {listed}; its result on the CPU is {result}")
with torch.autocast("cpu", torch.bfloat16):
    print("cross_entropy on the CPU:", F.cross_entropy(x, torch.zeros(4, dtype=torch.long)).dtype)
sys.exit(0 if all(seen) else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
