#!/usr/bin/env bash
# accelerate: `accelerate launch --cpu --num_processes 2` runs one process.
#
# Expected: two processes that speak by gloo, as `--num_processes 2` gives two on GPUs.
# Seen: one process, DistributedType.NO, exit code 0. `torchrun --nproc-per-node 2` with ACCELERATE_USE_CPU=1 gives
#   two.
# Matters: this is the command with which one tests a distributed script on a laptop or in CI. The test passes,
#   having tested nothing distributed. A test for several processes should check its world size.
#
# Printed on 2026-11-30, Python 3.11:
#   accelerate launch --cpu --num_processes 2:
#   torch 2.13.0+cpu accelerate 1.15.0: processes 1, DistributedType.NO
#   torchrun --nproc-per-node 2, ACCELERATE_USE_CPU=1:
#   torch 2.13.0+cpu accelerate 1.15.0: processes 2, DistributedType.MULTI_CPU
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
import accelerate
import torch
from accelerate import Accelerator

accelerator = Accelerator()
if accelerator.is_main_process:
    print("torch", torch.__version__, "accelerate", accelerate.__version__, end=": ")
    print(f"processes {accelerator.num_processes}, {accelerator.distributed_type}")
accelerator.end_training()
EOF
export OMP_NUM_THREADS=1
echo "accelerate launch --cpu --num_processes 2:"
"$venv/bin/accelerate" launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
  check.py | tee launched.txt
echo "torchrun --nproc-per-node 2, ACCELERATE_USE_CPU=1:"
ACCELERATE_USE_CPU=1 "$venv/bin/torchrun" --standalone --nproc-per-node 2 check.py | tee torchrun.txt
grep -q "processes 1," launched.txt && grep -q "processes 2," torchrun.txt || { echo changed >&2; exit 1; }
