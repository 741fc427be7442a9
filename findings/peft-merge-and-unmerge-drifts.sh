#!/usr/bin/env bash
# peft: `merge_adapter()` followed by `unmerge_adapter()` changes the frozen base weights, a little more each time.
#
# Expected: unmerging gives back the base weights that were there before, as nothing trains them.
# Seen: the adapter's product is added in place and subtracted again; no copy is kept, and in bfloat16 a sum rounds.
#   After 200 rounds with adapters of a trained size, drawn anew each time, half of the base weights have other
#   values and have moved by 0.4 % of their norm, more than a third of the size of the adapter itself. In float32
#   they move by a hundred-thousandth of it.
# Matters: reinforcement learning with LoRA merges before each hand-over of weights to the generator and unmerges
#   after it, once a step. Only the adapter is saved; loaded onto the true base it is not the model that was trained
#   and measured. Keep a copy of the base, or hand the adapter over by itself.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu transformers 5.23.0 peft 0.21.2
#   200 rounds of merge_adapter() and unmerge_adapter():
#   torch.float32: 45% of the base weights changed, by 7.9e-08 of their norm (the adapter: 1.0e-02)
#   torch.bfloat16: 47% of the base weights changed, by 3.9e-03 of their norm (the adapter: 1.0e-02)
set -euo pipefail
packages=(torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 accelerate==1.15.0 peft==0.21.2 numpy==2.4.6)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV_CACHE:-$work}/$(printf '%s' "${packages[*]}" | cksum | cut -d ' ' -f 1)
[ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cat > check.py <<'EOF'
import sys

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def drift(dtype):
    torch.manual_seed(0)
    size = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**size)).to(dtype)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = layer.base_layer.weight.detach().float().clone()
    for step in range(200):
        with torch.no_grad():  # stands for training: another adapter of the same size
            layer.lora_B["default"].weight.normal_(0, 1e-3 * min(1, step / 50))
        model.merge_adapter()
        model.unmerge_adapter()
    moved = layer.base_layer.weight.detach().float() - before
    changed = (moved != 0).float().mean().item()
    sizes = [x.norm().item() / before.norm().item() for x in (moved, layer.get_delta_weight("default").float())]
    print(f"{dtype}: {changed:.0%} of the base weights changed, by {sizes[0]:.1e} of their norm", end=" ")
    print(f"(the adapter: {sizes[1]:.1e})")
    return sizes[0] / sizes[1]


print("torch", torch.__version__, "transformers", transformers.__version__, "peft", peft.__version__)
transformers.logging.set_verbosity_error()
print("200 rounds of merge_adapter() and unmerge_adapter():")
single, half = drift(torch.float32), drift(torch.bfloat16)
sys.exit(0 if single < 1e-4 and half > 0.1 else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
