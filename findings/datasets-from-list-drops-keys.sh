#!/usr/bin/env bash
# datasets: `Dataset.from_list` drops every key that the first row does not have.
#
# Expected: a key that is missing in some rows is null there, as `load_dataset("json")` has it for the same rows, or
#   an error.
# Seen: the columns are those of the first row. A key that first comes in the second row vanishes, data and all,
#   with no warning; inside a nested dict, on the other hand, keys of later rows are kept.
# Matters: records of chats, tools and preference pairs have optional keys ("tools", "rejected", "system"). Whether
#   a column exists depends on which record happens to be first, and trainers treat a missing optional column as a
#   choice.
#
# Printed on 2026-11-30, Python 3.11:
#   datasets 5.2.0
#   rows: [{'prompt': 'a'}, {'prompt': 'b', 'tools': 'search'}]
#   from_list: {'prompt': ['a', 'b']}
#   load_dataset: {'prompt': ['a', 'b'], 'tools': [None, 'search']}
#   from_list, nested: [{'prompt': 'a', 'tools': None}, {'prompt': 'b', 'tools': 'search'}]
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
from datasets import Dataset, load_dataset

datasets.disable_progress_bars()
print("datasets", datasets.__version__)
rows = [{"prompt": "a"}, {"prompt": "b", "tools": "search"}]
with open("rows.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
listed = Dataset.from_list(rows)[:]
loaded = load_dataset("json", data_files="rows.jsonl", split="train")[:]
nested = Dataset.from_list([{"meta": row} for row in rows])["meta"][:]
print("rows:", rows)
print("from_list:", listed)
print("load_dataset:", loaded)
print("from_list, nested:", nested)
dropped = listed == {"prompt": ["a", "b"]} and loaded["tools"] == [None, "search"]
sys.exit(0 if dropped and nested[1] == rows[1] else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
