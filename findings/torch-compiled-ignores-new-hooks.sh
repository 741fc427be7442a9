#!/usr/bin/env bash
# torch: a forward hook that is registered after the first compiled call never fires.
#
# Expected: torch.compile guards what it relied on and compiles again when a module changes, as it does for train
#   and eval, attributes and shapes.
# Seen: a hook on a submodule, added after the first call, is skipped for ever, without a warning. Calling the same
#   module uncompiled runs the hook.
# Matters: activation statistics, probes, steering vectors and profilers are attached to models that have long run.
#   They report nothing, or change nothing, and look as if they found nothing. Register them before the first call,
#   or call `torch._dynamo.reset()`.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu
#   hook added after the first call: 0 calls compiled, 1 call of the same module uncompiled
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

print("torch", torch.__version__)
torch.manual_seed(0)
x = torch.randn(2, 4)

model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
compiled = torch.compile(model, backend="eager")  # any backend: the guards come before it
compiled(x)
calls = []
model[0].register_forward_hook(lambda *_: calls.append(1))
compiled(x)
added = len(calls)
model(x)
uncompiled = len(calls) - added
print(f"hook added after the first call: {added} calls compiled, {uncompiled} call of the same module uncompiled")

sys.exit(0 if (added, uncompiled) == (0, 1) else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
