#!/usr/bin/env bash
# Build the wheel, install it into an empty venv, and use it from another folder, where the repository cannot be imported.
# PIP_ARGS: further arguments for pip, such as a version of torch.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}

"$python" -m venv "$work/build"
"$work/build/bin/python" -m pip install -q build
rm -rf dist build/lib
"$work/build/bin/python" -m build --outdir dist . > "$work/build.log" || { tail -20 "$work/build.log" >&2; exit 1; }

# nothing but the package lies in the wheel
strays=$("$python" -m zipfile -l dist/*.whl | awk 'NR > 1 {print $1}' | grep -vE '^nanochat_hf(/|-[0-9])' || true)
[ -z "$strays" ] || { echo "the wheel holds more than nanochat_hf: $strays" >&2; exit 1; }

"$python" -m venv "$work/user"
"$work/user/bin/python" -m pip install -q -c "$root/constraints.txt" ${PIP_ARGS:-} "$(echo dist/*.whl)"
cd "$work"
"$work/user/bin/python" - <<'PY'
import importlib.util
from pathlib import Path

import nanochat_hf
from nanochat_hf import NanochatConfig, NanochatForCausalLM

place = Path(nanochat_hf.__file__)
assert "site-packages" in place.parts, place
assert (place.parent / "py.typed").is_file() and (place.parent / "chat_template.jinja").is_file()
for extra in ("wandb", "matplotlib"):
    assert importlib.util.find_spec(extra) is None, f"{extra} is an extra, and was installed"
assert importlib.util.find_spec("scripts") is None
print(nanochat_hf.__version__, type(NanochatForCausalLM(NanochatConfig(num_hidden_layers=1))).__name__)
PY
for command in chat_sft base_train; do
    "$work/user/bin/accelerate" launch --cpu -m "nanochat_hf.cli.$command" --help > "$work/$command.txt" 2> "$work/log" ||
        { tail -20 "$work/log" >&2; exit 1; }
    grep -q -- --device-batch-size "$work/$command.txt"
done
for command in tok_train chat_cli plan plot_schedules; do
    "$work/user/bin/python" -m "nanochat_hf.cli.$command" --help > /dev/null
done
echo "the wheel works on its own"
