#!/usr/bin/env bash
# transformers: a forward pass appends to the cache that it is given, even with `use_cache=False`.
#
# Expected: `use_cache=False` leaves a cache alone that was passed for reading, and a prefix computed once can be
#   shared between continuations, as it could when caches were tuples.
# Seen: the cache is extended in place. The second continuation attends to the first one's tokens; its scores are
#   wrong by as much as the first one's text matters, and nothing is raised.
# Matters: scoring the answers of a multiple-choice question from one cached prompt, best-of-n, speculative drafts
#   and reward models on shared prompts all do this. Copy the cache (`copy.deepcopy`) or `crop` it back after each
#   use.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu transformers 5.23.0
#   positions in the cache: 8 after the prompt, 11 after a continuation with use_cache=False
#   logits of the second continuation: off by 4.045 from the shared cache, by 0.000006 from a copy
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
import copy
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__)
size = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=2, initializer_range=0.3)).eval()
prompt, first, second = (torch.randint(64, (1, length)) for length in (8, 3, 3))
with torch.no_grad():
    cache = model(prompt).past_key_values
    kept = copy.deepcopy(cache)
    before = cache.get_seq_length()
    model(first, past_key_values=cache, use_cache=False)
    after = cache.get_seq_length()
    shared = model(second, past_key_values=cache, use_cache=False).logits
    right = model(torch.cat([prompt, second], dim=1)).logits[:, -3:]
    copied = model(second, past_key_values=kept, use_cache=False).logits
print(f"positions in the cache: {before} after the prompt, {after} after a continuation with use_cache=False")
wrong, fine = ((x - right).abs().max().item() for x in (shared, copied))
print(f"logits of the second continuation: off by {wrong:.3f} from the shared cache, by {fine:.6f} from a copy")
sys.exit(0 if (before, after) == (8, 11) and wrong > 0.1 and fine < 1e-3 else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
