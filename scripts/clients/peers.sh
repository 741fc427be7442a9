#!/bin/bash
# PEFT, torchao, TRL and ONNX Runtime on a saved folder: the tests that are skipped where these are not installed.
#   scripts/clients/peers.sh [VENV]      VENV (default .venv-peers) is made where it is not there
# PYTHON is the one that has nanochat_hf, whose packages VENV uses.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${1:-.venv-peers} python=${PYTHON:-python}
if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv "$venv"
  "$python" -c 'import site; print(site.getsitepackages()[0])' > "$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/base.pth"
  "$venv/bin/pip" install --quiet -c constraints.txt peft torchao trl jmespath onnx onnxscript onnxruntime
fi
"$venv/bin/python" -c '
from importlib.metadata import version
names = "peft", "torchao", "trl", "onnx", "onnxscript", "onnxruntime", "transformers", "torch"
print(", ".join(f"{name} {version(name)}" for name in names))'
OMP_NUM_THREADS=1 PYTHONPATH=$PWD "$venv/bin/python" -m pytest -p no:randomly -rs tests/clients tests/model/test_peers.py
