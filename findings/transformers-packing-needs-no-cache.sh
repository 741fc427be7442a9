#!/usr/bin/env bash
# transformers: rows packed by `position_ids` are kept apart only with `use_cache=False` and without a mask;
# otherwise documents see each other.
#
# Expected: positions that start again at 0 mark documents, as in the rows of DataCollatorWithFlattening; a mask of
#   ones says nothing new, and whether keys are cached has no influence on the result.
# Seen: a plain `model(input_ids, position_ids=…)`, in training mode too, lets the second document attend to the
#   first, since `use_cache` is on unless told otherwise. With `use_cache=False` they are apart; adding
#   `attention_mask=ones` joins them again. Eager attention and sdpa alike.
# Matters: a training loop of one's own that packs without padding trains on attention across documents, with no
#   warning; the Trainer switches the cache off, which hides it. The loss at hand shows nothing, as it is a good
#   loss.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu transformers 5.23.0
#   sdpa, as it is: the second document's logits are off by 6.9362
#   sdpa, use_cache=False: the second document's logits are off by 0.0000
#   sdpa, use_cache=False, attention_mask=ones: the second document's logits are off by 6.9362
#   eager, as it is: the second document's logits are off by 6.9362
#   eager, use_cache=False: the second document's logits are off by 0.0000
#   eager, use_cache=False, attention_mask=ones: the second document's logits are off by 6.9362
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
transformers.logging.set_verbosity_error()
size = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
config = LlamaConfig(**size, num_key_value_heads=2, initializer_range=0.3)
calls = {
    "as it is": {},
    "use_cache=False": {"use_cache": False},
    "use_cache=False, attention_mask=ones": {"use_cache": False, "attention_mask": torch.ones(1, 11, dtype=torch.long)},
}
seen = []
for attention in ("sdpa", "eager"):
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention).train()
    first, second = torch.randint(64, (1, 6)), torch.randint(64, (1, 5))
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
    with torch.no_grad():
        alone = model(second).logits
        for name, options in calls.items():
            packed = model(torch.cat([first, second], dim=1), position_ids=positions, **options).logits[:, 6:]
            seen.append((packed - alone).abs().max().item())
            print(f"{attention}, {name}: the second document's logits are off by {seen[-1]:.4f}")
sys.exit(0 if all((error > 0.1) == (at % 3 != 1) for at, error in enumerate(seen)) else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
