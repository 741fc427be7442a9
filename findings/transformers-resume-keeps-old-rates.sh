#!/usr/bin/env bash
# transformers: a Trainer that resumes takes learning rate and weight decay from the checkpoint, not from its
# arguments.
#
# Expected: new TrainingArguments hold for the steps to come; a difference from the checkpoint is at least reported.
# Seen: the run goes on at the old rate and decay. The optimizer's state dict carries both in its parameter groups,
#   and the scheduler's carries its base rate. `trainer.args` and every tracker show the new, unused values.
# Matters: "resume with a tenth of the rate", the first thing one tries after a spike, changes nothing at all, and a
#   comparison of decays from a common checkpoint compares equals. Start from the weights with a new optimizer
#   instead, or set the groups and `base_lrs` after loading.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu transformers 5.23.0 accelerate 1.15.0
#   first run asks for 1e-3 and 0.1; used (lr, weight decay): [(0.001, 0.1), (0.001, 0.1)]
#   resumed, asks for 1e-5 and 0.5; used: [(0.001, 0.1), (0.001, 0.1)]
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
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers import default_data_collator as collate

print("torch", torch.__version__, "transformers", transformers.__version__, "accelerate", accelerate.__version__)
transformers.utils.logging.disable_progress_bar()
size = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
torch.manual_seed(0)
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (64, 8)).tolist()]


class Watch(TrainerCallback):
    """Notes the optimizer's real settings before each step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        group = optimizer.param_groups[0]
        self.seen.append((group["lr"], group["weight_decay"]))


def train(steps, rate, decay, resume=None):
    model = LlamaForCausalLM(LlamaConfig(**size))
    options = dict(per_device_train_batch_size=2, save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    arguments = TrainingArguments(
        "run", max_steps=steps, learning_rate=rate, weight_decay=decay, lr_scheduler_type="constant", **options
    )
    watch = Watch()
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[watch])
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return watch.seen


first = train(2, 1e-3, 0.1)
second = train(4, 1e-5, 0.5, "run/checkpoint-2")
print("first run asks for 1e-3 and 0.1; used (lr, weight decay):", first)
print("resumed, asks for 1e-5 and 0.5; used:", second)
sys.exit(0 if first == [(1e-3, 0.1)] * 2 and second == first else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
