#!/usr/bin/env bash
# accelerate: of several Accelerators in a process the first decides about torch.compile and the last about
# accumulation, for all of them.
#
# Expected: each object does what its constructor was told, or raises, as it does for another mixed precision.
# Seen: the second's `dynamo_plugin` is ignored without a word and its model comes back uncompiled; its number of
#   accumulation steps replaces the first's, even by the value that it has when nothing is said. Both live in state
#   shared by all.
# Matters: a bare `Accelerator()` made early (to print on rank 0) or late (in a helper, for a second model, in the
#   same notebook) switches off compiling or accumulation in the run. One shows as a slow run, the other as steps
#   that are smaller than their batch size says.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu accelerate 1.15.0
#   second Accelerator, asked for aot_eager: backend NO, compiled False
#   accumulation of one that asked for 4: 4, and 1 once a bare Accelerator was made
#   another, asked for another mixed precision: ValueError: AcceleratorState has already been initialized and
#     cannot be changed
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
accumulating = Accelerator(cpu=True, gradient_accumulation_steps=4)
before = accumulating.gradient_accumulation_steps
Accelerator(cpu=True)
after = accumulating.gradient_accumulation_steps
print(f"accumulation of one that asked for 4: {before}, and {after} once a bare Accelerator was made")
try:
    Accelerator(cpu=True, mixed_precision="bf16")
    raised = False
except ValueError as error:
    raised = True
    print("another, asked for another mixed precision: ValueError:", str(error).split(",")[0])
sys.exit(0 if not compiled and raised and (before, after) == (4, 1) else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
