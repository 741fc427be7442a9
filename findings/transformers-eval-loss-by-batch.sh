#!/usr/bin/env bash
# transformers: the Trainer's evaluation loss depends on the evaluation batch size, though its training loss does
# not.
#
# Expected: since the training loss is a mean over all tokens of a step, however it is split, `eval_loss` is a mean
#   over the tokens of the data set.
# Seen: `eval_loss` is the mean of the batches' means, each weighed by its rows. With rows of unequal length it
#   moves with `per_device_eval_batch_size`; at batch size 1 a row of 2 tokens counts as much as one of 40.
# Matters: perplexities from different batch sizes, numbers of devices or paddings cannot be compared, and neither
#   can `eval_loss` and `loss`. Sum the loss and count the tokens yourself.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu transformers 5.23.0 accelerate 1.15.0
#   eval_loss at batch size 1: 4.8278, at 2: 5.4026; mean over tokens: 5.4026
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

import accelerate
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

print("torch", torch.__version__, "transformers", transformers.__version__, "accelerate", accelerate.__version__)
size = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=2, initializer_range=0.3))
rows = [{"input_ids": torch.randint(64, (length,))} for length in [2, 40] * 8]


def pad(batch):
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in batch], batch_first=True, padding_value=-1)
    labels = ids.masked_fill(ids < 0, -100)
    return {"input_ids": ids.clamp(min=0), "labels": labels, "attention_mask": (ids >= 0).long()}


def evaluate(batch_size):
    options = dict(per_device_eval_batch_size=batch_size, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, TrainingArguments("run", **options), data_collator=pad)
    trainer.remove_callback(PrinterCallback)
    return trainer.evaluate(rows)["eval_loss"]


def per_token():
    total = count = 0
    with torch.no_grad():
        for row in rows:
            ids = row["input_ids"][None]
            total += model(ids, labels=ids).loss.item() * (ids.numel() - 1)
            count += ids.numel() - 1
    return total / count


ones, twos, mean = evaluate(1), evaluate(2), per_token()
print(f"eval_loss at batch size 1: {ones:.4f}, at 2: {twos:.4f}; mean over tokens: {mean:.4f}")
sys.exit(0 if abs(ones - twos) > 0.05 and abs(ones - mean) > 0.05 else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
