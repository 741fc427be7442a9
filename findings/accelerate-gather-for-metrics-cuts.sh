#!/usr/bin/env bash
# accelerate: `gather_for_metrics` cuts the last batch to the number of missing rows, whatever its first dimension
# counts.
#
# Expected: it drops the rows that were repeated to fill the last batch.
# Seen: it keeps the first r entries of the first dimension, r being the rows of the last batch. Given one number
#   per token (rows × positions, flattened) it keeps r tokens. Given one mean per process it keeps all of them if r
#   is larger, so repeated rows count.
# Matters: losses per token and metrics of flattened masks are the usual thing for language models. The last batch
#   then weighs almost nothing, and evaluation depends on the number of processes. Gather tensors with a row per
#   example only.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu accelerate 1.15.0 2 processes
#   10 rows of 4 tokens, 3 rows a batch and process: 10 of 10 rows, 28 of 40 tokens gathered
#   mean of 0 to 9 by means of batches: 3.833 (4.5)
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

accelerator = Accelerator(cpu=True)
loader = accelerator.prepare(DataLoader(torch.arange(10), batch_size=3))
rows, tokens, means = [], [], []
for batch in loader:
    rows.append(accelerator.gather_for_metrics(batch))
    per_token = batch[:, None].expand(-1, 4).float()  # 4 positions a row
    tokens.append(accelerator.gather_for_metrics(per_token.flatten()))
    means.append(accelerator.gather_for_metrics(batch.float().mean()[None]))
seen = torch.cat(rows).numel(), torch.cat(tokens).numel(), torch.cat(means).numel()
if accelerator.is_main_process:
    print("torch", torch.__version__, "accelerate", accelerate.__version__, accelerator.num_processes, "processes")
    print(f"10 rows of 4 tokens, 3 rows a batch and process: {seen[0]} of 10 rows, {seen[1]} of 40 tokens gathered")
    print("mean of 0 to 9 by means of batches:", round(torch.cat(means).mean().item(), 3), "(4.5)")
accelerator.end_training()
sys.exit(0 if accelerator.num_processes == 2 and seen == (10, 28, 4) else "changed")
EOF
ACCELERATE_USE_CPU=1 OMP_NUM_THREADS=1 "$venv/bin/torchrun" --standalone --nproc-per-node 2 check.py
