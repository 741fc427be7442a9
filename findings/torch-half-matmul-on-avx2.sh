#!/usr/bin/env bash
# torch: on a CPU without AVX-512 a bfloat16 product takes many times as long as a float32 one, and CPU autocast
# picks bfloat16.
#
# Expected: half the bytes make it faster, or at worst as fast as a conversion to float32 and back.
# Seen: 7 to 100 times slower with AVX2 alone, by the size of the product and what else the machine does; float16
#   likewise. To cast both operands to float32, multiply and cast back is several times faster than the product
#   itself.
# Matters: `torch.autocast("cpu")` means bfloat16, and small runs and tests on laptops and CI machines are mostly of
#   this kind of CPU. Time one product before choosing a dtype: `get_cpu_capability()` and tables of names do not
#   say it. (Skipped with AVX-512, AMX or another architecture, where there may be instructions for it.)
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu AVX2
#   (1024 × 192) · (192 × 768), one thread, float32 = 1: torch.bfloat16 55.9, by float32 1.4
#   (1024 × 192) · (192 × 768), one thread, float32 = 1: torch.float16 98.1, by float32 2.1
#   dtype of a product under torch.autocast('cpu'): torch.bfloat16
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
import time

import torch

print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
if torch.backends.cpu.get_cpu_capability() != "AVX2":
    print("skipped: this CPU is not of the kind that the finding speaks of (AVX2 and no AVX-512)")
    sys.exit(0)
torch.set_num_threads(1)


def best(function):
    function()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


a, b = torch.randn(1024, 192), torch.randn(192, 768)
single = best(lambda: a @ b)
ratios = {}
for dtype in (torch.bfloat16, torch.float16):
    x, y = a.to(dtype), b.to(dtype)
    ratios[dtype] = best(lambda x=x, y=y: x @ y) / single
    detour = best(lambda x=x, y=y, dtype=dtype: (x.float() @ y.float()).to(dtype)) / single
    print(f"(1024 × 192) · (192 × 768), one thread, float32 = 1: {dtype} {ratios[dtype]:.1f}, by float32 {detour:.1f}")
with torch.autocast("cpu"):
    print("dtype of a product under torch.autocast('cpu'):", (a @ b).dtype)
sys.exit(0 if min(ratios.values()) > 3 else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
