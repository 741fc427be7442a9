#!/usr/bin/env bash
# torch: making a LambdaLR after the optimizer's state was loaded resets the learning rate, and loading its state
# too does not bring it back.
#
# Expected: once both state dicts are loaded, the order in which the objects were made makes no difference.
# Seen: making the scheduler writes the schedule's first value into the optimizer; the scheduler's `load_state_dict`
#   does not write the present one back, though `get_last_lr()` then reports it. With a warm-up from 0 the first
#   step after a resume runs at a rate of 0, with a decay at the peak. (transformers' schedules with a warm-up are
#   LambdaLR. Schedulers that compute a rate from the one before, such as CosineAnnealingLR, are spared.)
# Matters: "load the optimizer, then build the schedule for what is left" reads well and is wrong by one step, which
#   may be at the peak rate late in training: a spike after each resume. Load the optimizer last, or build the
#   scheduler first.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu
#   warm-up of 10 steps, stopped at step 90: lr 1.0000
#     resumed, optimizer loaded last: 1.0000; scheduler made last: 0.0000 (get_last_lr() says 1.0000)
#   decay over 100 steps, stopped at step 90: lr 0.1000
#     resumed, optimizer loaded last: 0.1000; scheduler made last: 1.0000 (get_last_lr() says 0.1000)
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
from torch.optim.lr_scheduler import LambdaLR


def optimizer():
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    return torch.optim.SGD([weight], lr=1.0)


def resume(schedule, saved, optimizer_last):
    made = optimizer()
    if optimizer_last:
        scheduler = schedule(made)
        scheduler.load_state_dict(saved[1])
        made.load_state_dict(saved[0])
    else:
        made.load_state_dict(saved[0])
        scheduler = schedule(made)
        scheduler.load_state_dict(saved[1])
    return made.param_groups[0]["lr"], scheduler.get_last_lr()[0]


def warm_up(optimizer):
    return LambdaLR(optimizer, lambda step: min(1.0, step / 10))


def decay(optimizer):
    return LambdaLR(optimizer, lambda step: 1.0 - step / 100)


print("torch", torch.__version__)
seen = []
for name, schedule in (("warm-up of 10 steps", warm_up), ("decay over 100 steps", decay)):
    first = optimizer()
    scheduler = schedule(first)
    for _ in range(90):
        first.step()
        scheduler.step()
    saved = first.state_dict(), scheduler.state_dict()
    right, _ = resume(schedule, saved, optimizer_last=True)
    wrong, said = resume(schedule, saved, optimizer_last=False)
    seen.append((saved[0]["param_groups"][0]["lr"], right, wrong, said))
    print(f"{name}, stopped at step 90: lr {seen[-1][0]:.4f}")
    print(f"  resumed, optimizer loaded last: {right:.4f}; scheduler made last: {wrong:.4f}", end=" ")
    print(f"(get_last_lr() says {said:.4f})")
holds = [lr == right and said == lr for lr, right, _, said in seen]
sys.exit(0 if all(holds) and seen[0][2] == 0.0 and seen[1][2] == 1.0 else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
