#!/usr/bin/env bash
# datasets: in `map(num_proc=2)` both processes draw the same numbers from NumPy and torch.
#
# Expected: each process draws numbers of its own; DataLoader has seeded its workers so for years.
# Seen: processes are forked with the parent's generators, so numpy.random and torch give the second half of the
#   rows exactly the draws of the first. Python's `random` is seeded anew in each process: its draws differ, and
#   cannot be repeated by a seed.
# Matters: augmentation, random crops, noising, negative sampling and random templates repeat num_proc times over
#   the data set, and the result is cached. Draw from a generator seeded by the row's index (`with_indices=True`).
#
# Printed on 2026-11-30, Python 3.11:
#   datasets 5.2.0 torch 2.13.0+cpu numpy 2.4.6
#   numpy: 0.549 0.715 0.603 0.545 0.549 0.715 0.603 0.545 | halves equal: True
#   torch: 0.496 0.768 0.088 0.132 0.496 0.768 0.088 0.132 | halves equal: True
#   random: 0.940 0.391 0.362 0.419 0.125 0.830 0.852 0.165 | halves equal: False
set -euo pipefail
packages=(torch==2.13.0 datasets==5.2.0 pyarrow==26.0.1 numpy==2.4.6)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV_CACHE:-$work}/$(printf '%s' "${packages[*]}" | cksum | cut -d ' ' -f 1)
[ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cat > check.py <<'EOF'
import random
import sys

import datasets
import numpy
import torch
from datasets import Dataset


def draw(row):
    return {"numpy": numpy.random.rand(), "torch": torch.rand(()).item(), "random": random.random()}


datasets.disable_progress_bars()
print("datasets", datasets.__version__, "torch", torch.__version__, "numpy", numpy.__version__)
random.seed(0)
numpy.random.seed(0)
torch.manual_seed(0)
rows = Dataset.from_dict({"x": list(range(8))}).map(draw, num_proc=2)
repeated = {}
for library in ("numpy", "torch", "random"):
    drawn = rows[library][:]
    repeated[library] = drawn[:4] == drawn[4:]
    print(f"{library}:", *(f"{number:.3f}" for number in drawn), "| halves equal:", repeated[library])
sys.exit(0 if repeated == {"numpy": True, "torch": True, "random": False} else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
