#!/usr/bin/env bash
# datasets: a stream's state that was saved on 2 processes loads on 4 without an error, and rows are lost.
#
# Expected: loading the state of another split of the data fails, or goes on with the rows that are left.
# Seen: the state holds a place in a list of shards and not whose list. On 4 processes the same numbers point into
#   other shards: rows are skipped that nobody has read, and no message says so.
# Matters: to resume on more or fewer GPUs is what checkpoints are for. Store the world size beside the state and
#   refuse another, or count global rows and skip.
#
# Printed on 2026-11-30, Python 3.11:
#   datasets 5.2.0
#   12 of 32 rows read on 2 processes, resumed on 2: 20 more, never read: []
#   12 of 32 rows read on 2 processes, resumed on 4: 8 more, never read: [16, 17, 18, 19, 20, 21, 24, 25, 26, 27,
#     28, 29]
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
from datasets.distributed import split_dataset_by_node


def stream(rank, world_size):
    rows = Dataset.from_dict({"row": list(range(32))}).to_iterable_dataset(num_shards=4)
    return split_dataset_by_node(rows, rank, world_size)


def start(world_size):
    read, states = [], []
    for rank in range(2):
        rows = stream(rank, 2)
        iterator = iter(rows)
        read += [next(iterator)["row"] for _ in range(6)]
        states.append(rows.state_dict())
    rest = []
    for rank in range(world_size):
        rows = stream(rank, world_size)
        rows.load_state_dict(states[rank % 2])
        rest += [row["row"] for row in rows]
    never = sorted(set(range(32)) - set(read) - set(rest))
    print(f"12 of 32 rows read on 2 processes, resumed on {world_size}: {len(rest)} more, never read: {never}")
    return len(never)


print("datasets", datasets.__version__)
sys.exit(0 if (start(2), start(4)) == (0, 12) else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
