#!/usr/bin/env bash
# torch: `torch.rand` in bfloat16 is exactly 0 once in 512 draws, so that its logarithm is infinite.
#
# Expected: zero comes about as seldom as in float32 (once in 16 million): half precision has numbers down to 1e-38
#   (bfloat16) and 6e-8 (float16).
# Seen: on the CPU bfloat16 gives 0 some 2,000 times in a million draws and float16 250 times. Small values as a
#   whole come too often: three times as many bfloat16 draws lie below 0.001 as should.
# Matters: noise of one's own, such as `-log(rand_like(logits))` for exponential clocks or Gumbel's trick, has
#   infinities in every row of a usual vocabulary once logits are half precision, and masks of rare events
#   (`rand_like(x) < 1e-3`) hit three times too often. Draw in float32, or by `exponential_`, which gave no 0.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu CPU, 1000000 draws
#   torch.float32: 0 zeros, 0 infinite logarithms, 977 below 0.001, 0 zeros from exponential_
#   torch.float16: 253 zeros, 253 infinite logarithms, 1230 below 0.001, 0 zeros from exponential_
#   torch.bfloat16: 1963 zeros, 1963 infinite logarithms, 2937 below 0.001, 0 zeros from exponential_
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

count = 1_000_000
print("torch", torch.__version__, f"CPU, {count} draws")
zeros, rare = {}, {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    torch.manual_seed(0)
    draws = torch.rand(count, dtype=dtype)
    zeros[dtype] = (draws == 0).sum().item()
    rare[dtype] = (draws < 1e-3).sum().item()
    infinite = torch.isinf(-torch.log(draws)).sum().item()
    clock = (torch.empty(count, dtype=dtype).exponential_() == 0).sum().item()
    print(f"{dtype}: {zeros[dtype]} zeros, {infinite} infinite logarithms, {rare[dtype]} below 0.001,", end=" ")
    print(f"{clock} zeros from exponential_")
often = zeros[torch.bfloat16] > 1000 and rare[torch.bfloat16] > 2 * rare[torch.float32]
sys.exit(0 if zeros[torch.float32] == 0 and often else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
