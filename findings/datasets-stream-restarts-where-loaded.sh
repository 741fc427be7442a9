#!/usr/bin/env bash
# datasets: after `IterableDataset.load_state_dict` every later epoch starts at the loaded place too.
#
# Expected: the state says where the present epoch goes on; the next `for` over the data starts at the beginning.
# Seen: each iteration starts at the place that was loaded. Rows before it never come again in that process.
# Matters: a run that stops at 90 % of an epoch and resumes for ten more epochs sees the last tenth of the data ten
#   times and the rest not at all; loss falls nicely. Load the state for the first iteration and make the data set
#   anew for the next, or use `repeat()` and one iteration.
#
# Printed on 2026-11-30, Python 3.11:
#   datasets 5.2.0
#   rows 0 to 5; read before the stop: [0, 1, 2, 3]
#   resumed, three epochs: [4, 5] [4, 5] [4, 5]
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
import sys

import datasets
from datasets import Dataset

print("datasets", datasets.__version__)


def stream():
    return Dataset.from_dict({"row": list(range(6))}).to_iterable_dataset(num_shards=2)


first = stream()
iterator = iter(first)
read = [next(iterator)["row"] for _ in range(4)]
resumed = stream()
resumed.load_state_dict(first.state_dict())
epochs = [[row["row"] for row in resumed] for _ in range(3)]
print("rows 0 to 5; read before the stop:", read)
print("resumed, three epochs:", *epochs)
sys.exit(0 if epochs == [[4, 5]] * 3 else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
