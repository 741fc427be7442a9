#!/usr/bin/env bash
# transformers: `model.to(torch.bfloat16)` and `from_pretrained(dtype=torch.bfloat16)` give equal weights and two
# models.
#
# Expected: loading in bfloat16 and casting to bfloat16 are one and the same.
# Seen: loading keeps the frequencies of rotary positions in float32; `.to()`, `.bfloat16()` and `.half()` cast
#   them, as they are a buffer. A frequency rounded to 8 bits is multiplied by the position, so the angle's error
#   grows along the row: at position 2,000 cosines are off by up to 0.3 or more. No parameter differs, and saving
#   does not keep it.
# Matters: a model trained or evaluated after a cast works at short lengths and decays over long ones. Rotary
#   frequencies want float32 always: load with `dtype`, use autocast, or make the module anew after the cast.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu transformers 5.23.0
#   all parameters equal: True
#   dtype of the frequencies: torch.float32 torch.bfloat16
#   cosines at position 100: off by up to 0.000 loaded, 0.008 cast
#   cosines at position 2000: off by up to 0.000 loaded, 0.327 cast
#   cosines at position 8000: off by up to 0.000 loaded, 1.310 cast
#   logits over 1,024 tokens against float32: off by 0.033 loaded, 0.126 cast (relative norm)
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
from transformers import LlamaConfig, LlamaForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__)
transformers.utils.logging.disable_progress_bar()
size = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
config = LlamaConfig(**size, num_key_value_heads=2, max_position_embeddings=8192, initializer_range=0.3)
torch.manual_seed(0)
LlamaForCausalLM(config).save_pretrained("model")
loaded = LlamaForCausalLM.from_pretrained("model", dtype=torch.bfloat16)
cast = LlamaForCausalLM.from_pretrained("model", dtype=torch.float32).to(torch.bfloat16)
exact = LlamaForCausalLM.from_pretrained("model", dtype=torch.float32)
exact.load_state_dict(loaded.state_dict())  # the same rounded weights, computed in float32

same = all(torch.equal(a, b) for a, b in zip(loaded.parameters(), cast.parameters(), strict=True))
print("all parameters equal:", same)
print("dtype of the frequencies:", loaded.model.rotary_emb.inv_freq.dtype, cast.model.rotary_emb.inv_freq.dtype)
like = torch.zeros(1)
for position in (100, 2000, 8000):
    cosines = [m.model.rotary_emb(like, torch.tensor([[position]]))[0] for m in (exact, loaded, cast)]
    off = [(c - cosines[0]).abs().max().item() for c in cosines[1:]]
    print(f"cosines at position {position}: off by up to {off[0]:.3f} loaded, {off[1]:.3f} cast")
ids = torch.randint(64, (1, 1024))
with torch.no_grad():
    logits = [m.eval()(ids).logits.float() for m in (exact, loaded, cast)]
errors = [((x - logits[0]).norm() / logits[0].norm()).item() for x in logits[1:]]
print(f"logits over 1,024 tokens against float32: off by {errors[0]:.3f} loaded, {errors[1]:.3f} cast (relative norm)")
sys.exit(0 if same and off[1] > 0.3 and off[0] < 1e-6 and errors[1] > 2 * errors[0] else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
