#!/usr/bin/env bash
# datasets, pyarrow: a column of JSON strings comes back as timestamps if all of them look like dates.
#
# Expected: what is a string in JSON is a string in the data set; JSON has no dates.
# Seen: answers such as "2024-01-15" become datetime objects if every one in the block has that form; one "unknown"
#   among them keeps all of them strings. Printed again, the answer is "2024-01-15 00:00:00".
# Matters: in a question-answering set filtered to questions of the kind "when", or in a small test split, answers
#   change their type and exact match against "2024-01-15" scores 0; two shards of one set can have different
#   schemas. State `features=` when loading.
#
# Printed on 2026-11-30, Python 3.11:
#   datasets 5.2.0 pyarrow 26.0.1
#   ['2024-01-15', '1999-12-31']: timestamp[s], the first as text: 2024-01-15 00:00:00
#   ['2024-01-15', 'unknown']: string, the first as text: 2024-01-15
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
import json
import sys

import datasets
import pyarrow
from datasets import load_dataset

datasets.disable_progress_bars()
print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)
seen = []
for name, answers in (("dates", ["2024-01-15", "1999-12-31"]), ("mixed", ["2024-01-15", "unknown"])):
    with open(f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps({"answer": answer}) + "\n" for answer in answers)
    rows = load_dataset("json", data_files=f"{name}.jsonl", split="train")
    seen.append((rows.features["answer"].dtype, str(rows[0]["answer"])))
    print(f"{answers}: {seen[-1][0]}, the first as text: {seen[-1][1]}")
recorded = [("timestamp[s]", "2024-01-15 00:00:00"), ("string", "2024-01-15")]
sys.exit(0 if seen == recorded else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
