#!/usr/bin/env bash
# transformers, tokenizers: a tokenizer saved after use carries the truncation of its last call in tokenizer.json.
#
# Expected: `truncation=True, max_length=4` is an argument of one call.
# Seen: the call sets it in the Rust tokenizer behind, where it stays until the next call; `save_pretrained` writes
#   it into tokenizer.json. transformers itself resets it at each call. Whatever reads the file by `tokenizers`
#   (servers, data pipelines, other languages) cuts every text to that length, silently.
# Matters: training scripts tokenise with truncation and then save, so this file is what gets published. Check that
#   "truncation" and "padding" are null in it, or save before use.
#
# Printed on 2026-11-30, Python 3.11:
#   transformers 5.23.0 tokenizers 0.23.3
#   tokenizer.json, truncation: {'direction': 'Right', 'max_length': 4, 'strategy': 'LongestFirst', 'stride': 0}
#   tokens of one text: 9 before; from the file: transformers 9, tokenizers 4
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
import json
import sys

import tokenizers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
text = "the quick brown fox jumps over the lazy dog"
trained = Tokenizer(models.BPE())
trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
alphabet = pre_tokenizers.ByteLevel.alphabet()
options = dict(vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
trained.train_from_iterator([text] * 20, trainers.BpeTrainer(**options))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<eos>", pad_token="<eos>")

whole = len(trained.encode(text).ids)
tokenizer(text, truncation=True, max_length=4)
tokenizer.save_pretrained("saved")
with open("saved/tokenizer.json") as file:
    print("tokenizer.json, truncation:", json.load(file)["truncation"])
by_tokenizers = len(Tokenizer.from_file("saved/tokenizer.json").encode(text).ids)
by_transformers = len(AutoTokenizer.from_pretrained("saved")(text).input_ids)
print(f"tokens of one text: {whole} before; from the file: transformers {by_transformers}, tokenizers {by_tokenizers}")
sys.exit(0 if (by_transformers, by_tokenizers) == (whole, 4) and whole > 4 else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
