#!/usr/bin/env bash
# transformers, torch: GPT-2's key biases cannot change the output, and Adam trains them all the same.
#
# Expected: attention's softmax is blind to what all keys have in common, so the gradient of a key bias is zero and
#   the bias stays at zero.
# Seen: the gradient is zero but for rounding, a hundred thousand times smaller than its neighbour's, and Adam
#   divides by its size. Under bfloat16 autocast the rounding is above Adam's eps of 1e-8, so key biases move almost
#   as far as query biases; in float32 the same happens as soon as eps is smaller.
# Matters: any direction in which the loss is flat by symmetry walks by the learning rate, by a sign that rounding
#   chooses: biases before a norm, scalars before a normalised sum. Where the direction is flat only at the start,
#   the sign of a rounding error decides where the run goes.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu transformers 5.23.0 50 steps at lr 1e-3
#   float32, eps 1e-08: mean |gradient| of query biases 3.9e-04, key biases 1.6e-11; moved by 1.2e-02 and 7.9e-06
#   bfloat16 autocast, eps 1e-08: mean |gradient| of query biases 4.3e-04, key biases 2.7e-07; moved by 1.2e-02
#     and 5.4e-03
#   float32, eps 1e-12: mean |gradient| of query biases 2.9e-04, key biases 1.5e-11; moved by 1.2e-02 and 6.9e-03
set -euo pipefail
packages=(torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 accelerate==1.15.0 numpy==2.4.6)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV_CACHE:-$work}/$(printf '%s' "${packages[*]}" | cksum | cut -d ' ' -f 1)
[ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cat > check.py <<'EOF'
import sys

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel


def train(half, eps):
    torch.manual_seed(0)
    size = dict(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    model = GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, eps=eps)
    ids = torch.randint(256, (8, 64))
    bias = model.transformer.h[0].attn.c_attn.bias  # (3 × 64): queries, keys, values
    for _ in range(50):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    gradients = bias.grad.abs().view(3, 64).mean(dim=1).tolist()
    moved = bias.detach().abs().view(3, 64).mean(dim=1).tolist()
    print(f"{'bfloat16 autocast' if half else 'float32'}, eps {eps:g}: mean |gradient| of query biases", end=" ")
    print(f"{gradients[0]:.1e}, key biases {gradients[1]:.1e}; moved by {moved[0]:.1e} and {moved[1]:.1e}")
    return gradients[1] / gradients[0], moved[1] / moved[0]


transformers.logging.set_verbosity_error()
print("torch", torch.__version__, "transformers", transformers.__version__, "50 steps at lr 1e-3")
default, half, small_eps = train(False, 1e-8), train(True, 1e-8), train(False, 1e-12)
tiny = all(gradient < 0.01 for gradient, _ in (default, half, small_eps))
sys.exit(0 if tiny and default[1] < 0.01 and half[1] > 0.2 and small_eps[1] > 0.2 else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
