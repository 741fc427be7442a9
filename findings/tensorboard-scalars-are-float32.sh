#!/usr/bin/env bash
# tensorboard: a scalar is stored in 32 bits, so a count of tokens loses its last digits from 16.8 million on.
#
# Expected: a Python int or float comes back as it was logged; other trackers store 64 bits.
# Seen: 1,000,000,001 comes back as 1,000,000,000 and 1,000,000,033 as 1,000,000,064. Only the step is a 64-bit
#   integer.
# Matters: tokens seen, bytes read and seconds since the epoch are logged as scalars and later used as an axis or
#   differenced into a rate: at 10 billion tokens the steps between points are multiples of 1,024. Use the step for
#   counts, or log them in millions.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu tensorboard 2.21.0
#   logged: [1000000000, 1000000001, 1000000033]
#   read:   [1000000000, 1000000000, 1000000064] at steps [10000000000, 10000000001, 10000000002]
set -euo pipefail
packages=(torch==2.13.0 tensorboard==2.21.0 numpy==2.4.6)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV_CACHE:-$work}/$(printf '%s' "${packages[*]}" | cksum | cut -d ' ' -f 1)
[ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
cd "$work"
cat > check.py <<'EOF'
import sys

import tensorboard
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

print("torch", torch.__version__, "tensorboard", tensorboard.__version__)
logged = [1_000_000_000, 1_000_000_001, 1_000_000_033]
with SummaryWriter("events") as writer:
    for step, tokens in enumerate(logged):
        writer.add_scalar("tokens", tokens, 10_000_000_000 + step)
events = EventAccumulator("events").Reload().Scalars("tokens")
read = [int(event.value) for event in events]
print("logged:", logged)
print("read:  ", read, "at steps", [event.step for event in events])
sys.exit(0 if read == [1_000_000_000, 1_000_000_000, 1_000_000_064] else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
