#!/usr/bin/env bash
# datasets: `class_encode_column` on integer labels renumbers them, by the alphabetical order of their digits.
#
# Expected: labels 0 to 11 are classes already; encoding keeps the numbers and only adds the type.
# Seen: the numbers become strings and are sorted as such, so "10" and "11" come before "2": label 2 becomes 4, 10
#   becomes 2. Nothing changes with ten classes or fewer from 0, which is what one tries it on.
# Matters: `train_test_split(stratify_by_column=…)` demands a ClassLabel, so this is done in passing. Afterwards the
#   labels no longer are those of the model, of the names in a list, or of another split encoded another way. Use
#   `cast_column("label", ClassLabel(num_classes=n))`.
#
# Printed on 2026-11-30, Python 3.11:
#   datasets 5.2.0
#   labels:              [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
#   class_encode_column: [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3]
#   cast_column:         [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
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
from datasets import ClassLabel, Dataset

datasets.disable_progress_bars()
print("datasets", datasets.__version__)
labels = list(range(12))
rows = Dataset.from_dict({"label": labels})
encoded = rows.class_encode_column("label")["label"][:]
cast = rows.cast_column("label", ClassLabel(num_classes=12))["label"][:]
print("labels:             ", labels)
print("class_encode_column:", encoded)
print("cast_column:        ", cast)
sys.exit(0 if encoded == [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3] and cast == labels else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
