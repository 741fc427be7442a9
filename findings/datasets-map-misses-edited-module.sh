#!/usr/bin/env bash
# datasets: `map` does not notice that a function's code has changed if the function lives in a module.
#
# Expected: the cache is keyed by the function, code included: edit it, and `map` runs again. So it does for
#   functions of the script itself.
# Seen: a function imported from a module is hashed by its name. After an edit, the next run silently returns the
#   rows that the old code made; a function of the script that calls into the module does so too.
# Matters: real projects keep their preprocessing in modules. A mended tokenisation or template has no effect until
#   somebody deletes the cache, and the run looks right. Pass `new_fingerprint` made from a version of your own, or
#   `load_from_cache_file=False`.
#
# Printed on 2026-11-30, Python 3.11:
#   each function multiplies by 2:
#   datasets 5.2.0: imported [2, 4] | called by the script [2, 4] | the script's own [2, 4]
#   each function multiplies by 100:
#   datasets 5.2.0: imported [2, 4] | called by the script [2, 4] | the script's own [100, 200]
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
import preparing
from datasets import load_dataset

datasets.disable_progress_bars()
rows = load_dataset("json", data_files="rows.jsonl", split="train")


def here(row):
    return {"y": row["x"] * FACTOR}


def through(row):
    return preparing.scale(row)


imported = rows.map(preparing.scale)["y"][:]
called = rows.map(through)["y"][:]
own = rows.map(here)["y"][:]
print("datasets", datasets.__version__, end=": ")
print("imported", imported, "| called by the script", called, "| the script's own", own)
sys.exit(0 if (imported, called, own) == ([2, 4], [2, 4], [FACTOR, 2 * FACTOR]) else "changed")
EOF
printf '{"x": 1}\n{"x": 2}\n' > rows.jsonl
export OMP_NUM_THREADS=1
for factor in 2 100; do
  echo "each function multiplies by $factor:"
  printf 'def scale(row):\n    return {"y": row["x"] * %s}\n' "$factor" > preparing.py
  sed "s/FACTOR/$factor/g" check.py > run.py
  "$venv/bin/python" -B run.py
done
