#!/usr/bin/env bash
# accelerate: a prepared scheduler makes as many steps per call as there are processes.
#
# Expected: one `scheduler.step()` after one `optimizer.step()` is one step of the schedule, on any number of
#   processes.
# Seen: on two processes three calls advance the schedule by six. It is meant for schedules counted in batches of
#   one process; one counted in optimizer steps is through after 1/n of the run, and cosine or linear decay then
#   stays at 0 or, if periodic, rises again.
# Matters: the same script has another learning rate on 8 GPUs than on one, where nothing shows. Do not prepare a
#   scheduler that counts optimizer steps. (`split_batches=True` switches the rule off, and changes the batches as
#   well.)
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu accelerate 1.15.0 2 processes
#   decay to 0 over 6 steps; rate at step 0, 1, 2, 3: [1.0, 0.667, 0.333, 0.0]
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

accelerator = Accelerator(cpu=True)
optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 6))  # to 0 in 6 steps
optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
rates = []
for _ in range(3):
    rates.append(round(optimizer.param_groups[0]["lr"], 3))
    optimizer.step()
    scheduler.step()
rates.append(round(optimizer.param_groups[0]["lr"], 3))
if accelerator.is_main_process:
    print("torch", torch.__version__, "accelerate", accelerate.__version__, accelerator.num_processes, "processes")
    print("decay to 0 over 6 steps; rate at step 0, 1, 2, 3:", rates)
accelerator.end_training()
sys.exit(0 if accelerator.num_processes == 2 and rates == [1.0, 0.667, 0.333, 0.0] else "changed")
EOF
ACCELERATE_USE_CPU=1 OMP_NUM_THREADS=1 "$venv/bin/torchrun" --standalone --nproc-per-node 2 check.py
