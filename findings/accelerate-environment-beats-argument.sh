#!/usr/bin/env bash
# accelerate: for gradient accumulation the launcher's environment beats the constructor's argument; for mixed
# precision the argument beats the environment.
#
# Expected: one rule; what the code says outright wins.
# Seen: with ACCELERATE_GRADIENT_ACCUMULATION_STEPS=8 (`accelerate launch` sets it from its configuration under
#   DeepSpeed) `Accelerator(gradient_accumulation_steps=2)` accumulates 8. With ACCELERATE_MIXED_PRECISION=bf16
#   `Accelerator(mixed_precision="no")` computes in float32. Only a GradientAccumulationPlugin is left alone.
# Matters: loss scale, batch size and number of updates differ from those in the code and in the log of its
#   arguments. Read `accelerator.gradient_accumulation_steps` back, or pass the plugin.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu accelerate 1.15.0
#   environment: accumulate 8, bf16
#   arguments gradient_accumulation_steps=2, mixed_precision='no': 8 steps, precision no
#   GradientAccumulationPlugin(num_steps=2): 2 steps
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
import os
import sys

os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "8"
os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"

import accelerate  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.utils import GradientAccumulationPlugin  # noqa: E402

print("torch", torch.__version__, "accelerate", accelerate.__version__)
print("environment: accumulate 8, bf16")
first = Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=2)
seen = (first.gradient_accumulation_steps, first.mixed_precision)
plugin = GradientAccumulationPlugin(num_steps=2)
seen += (Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_plugin=plugin).gradient_accumulation_steps,)
print("arguments gradient_accumulation_steps=2, mixed_precision='no':", seen[0], "steps, precision", seen[1])
print("GradientAccumulationPlugin(num_steps=2):", seen[2], "steps")
sys.exit(0 if seen == (8, "no", 2) else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
