#!/usr/bin/env bash
# torch: DistributedDataParallel never reduces the gradients of parameters that were frozen when it wrapped the
# model.
#
# Expected: `requires_grad_(True)` later makes them train like all others, or raises.
# Seen: they train on each process by that process's own gradients. The copies part at the first step, with no error
#   and no warning, while all other parameters stay equal.
# Matters: gradual unfreezing (first the head, then the trunk) is a usual recipe. Under DDP the ranks then hold
#   different models; rank 0's is saved, trained on one share of the batches. Wrap again after unfreezing.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu gloo, 2 processes; largest difference between the two copies:
#     trunk frozen, 3 steps:    trunk 0.0000, head 0.0000
#     trunk unfrozen, 3 steps:  trunk 0.0443, head 0.0000
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
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
model[0].requires_grad_(False)
wrapped = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def apart(parameter):
    copies = [torch.empty_like(parameter) for _ in range(2)]
    dist.all_gather(copies, parameter.detach())
    return (copies[0] - copies[1]).abs().max().item()


def steps(count):
    for step in range(count):
        torch.manual_seed(10 * step + rank)  # each process has its own batches
        wrapped(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return apart(model[0].weight), apart(model[1].weight)


frozen = steps(3)
model[0].requires_grad_(True)
unfrozen = steps(3)
if rank == 0:
    print("torch", torch.__version__, "gloo, 2 processes; largest difference between the two copies:")
    print(f"  trunk frozen, 3 steps:    trunk {frozen[0]:.4f}, head {frozen[1]:.4f}")
    print(f"  trunk unfrozen, 3 steps:  trunk {unfrozen[0]:.4f}, head {unfrozen[1]:.4f}")
dist.destroy_process_group()
sys.exit(0 if frozen == (0.0, 0.0) and unfrozen[0] > 1e-3 and unfrozen[1] == 0.0 else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/torchrun" --standalone --nproc-per-node 2 check.py
