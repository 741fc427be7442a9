#!/usr/bin/env bash
# accelerate: only the first Accelerator of a process decides about torch.compile; what later ones ask for is
# dropped.
#
# Expected: the second Accelerator compiles as its `dynamo_plugin` says, or raises, as it does for another mixed
#   precision.
# Seen: the plugin is ignored without a word and the model comes back uncompiled. The same constructor raises
#   ValueError if `mixed_precision` differs.
# Matters: whoever makes a bare Accelerator early (to print on rank 0, to read the process index) or two in one
#   notebook trains without torch.compile and sees only that it is slow.
#
# Printed on 2026-11-30, Python 3.11:
#   (not run)
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
from accelerate.utils import TorchDynamoPlugin

print("torch", torch.__version__, "accelerate", accelerate.__version__)
Accelerator(cpu=True)
second = Accelerator(cpu=True, dynamo_plugin=TorchDynamoPlugin(backend="aot_eager"))
model = second.prepare(torch.nn.Linear(2, 2))
compiled = isinstance(model, torch._dynamo.eval_frame.OptimizedModule)
print(f"second Accelerator, asked for aot_eager: backend {second.state.dynamo_plugin.backend}, compiled {compiled}")
try:
    Accelerator(cpu=True, mixed_precision="bf16")
    raised = False
except ValueError as error:
    raised = True
    print("third, asked for another mixed precision: ValueError:", str(error).split(",")[0])
sys.exit(0 if not compiled and raised else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
