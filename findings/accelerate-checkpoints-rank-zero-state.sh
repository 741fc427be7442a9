#!/usr/bin/env bash
# accelerate: an object given to `register_for_checkpointing` is saved by rank 0 alone and loaded by all.
#
# Expected: `save_state` keeps each process's state, as it does for random numbers (one file a rank).
# Seen: one file, rank 0's; after `load_state` every process holds rank 0's state, with no warning.
# Matters: what needs registering is mostly what the process alone knows: where it is in its share of the data, its
#   replay buffer, its running statistics. After a resume all ranks read rank 0's share from rank 0's place: the
#   other shares are lost and rank 0's counts n times. Save such state in a file per rank.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu accelerate 1.15.0 2 processes
#   files: custom_checkpoint_0.pkl, random_states_0.pkl, random_states_1.pkl
#   saved by rank 0 and 1: [100, 101]; loaded: [100, 100]
set -euo pipefail
packages=(torch==2.13.0 accelerate==1.15.0 numpy==2.4.6)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV_CACHE:-$work}/$(printf '%s' "${packages[*]}" | cksum | cut -d ' ' -f 1)
[ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cat > check.py <<'EOF'
import os
import sys

import accelerate
import torch
from accelerate import Accelerator


class Position:
    """A place in this process's share of the data."""

    def __init__(self, rows):
        self.rows = rows

    def state_dict(self):
        return {"rows": self.rows}

    def load_state_dict(self, state):
        self.rows = state["rows"]


accelerator = Accelerator(cpu=True)
position = Position(100 + accelerator.process_index)
accelerator.register_for_checkpointing(position)
accelerator.save_state("state")
accelerator.wait_for_everyone()
position.rows = 0
accelerator.load_state("state")
got = accelerator.gather(torch.tensor([position.rows])).tolist()
if accelerator.is_main_process:
    print("torch", torch.__version__, "accelerate", accelerate.__version__, accelerator.num_processes, "processes")
    print("files:", ", ".join(sorted(os.listdir("state"))))
    print("saved by rank 0 and 1: [100, 101]; loaded:", got)
accelerator.end_training()
sys.exit(0 if got == [100, 100] else "changed")
EOF
ACCELERATE_USE_CPU=1 OMP_NUM_THREADS=1 "$venv/bin/torchrun" --standalone --nproc-per-node 2 check.py
