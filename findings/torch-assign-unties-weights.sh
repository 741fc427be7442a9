#!/usr/bin/env bash
# torch: `load_state_dict(assign=True)` turns one tied weight into two parameters over the same memory.
#
# Expected: a model whose head is its embedding comes back tied, or plainly untied.
# Seen: both. The two parameters share their memory, so the tie seems to hold (equal values for ever), but they are
#   two objects: the optimizer counts both, keeps two states, and applies weight decay, momentum and each half of
#   the gradient to the same memory one after the other.
# Matters: `assign=True` is the usual way to fill a model that was built on the meta device. The run trains; the
#   tied table merely gets another update than it should (with Adam: two steps instead of one), and parameter counts
#   are wrong. Tie again after loading.
#
# Printed on 2026-11-30, Python 3.11:
#   torch 2.13.0+cpu
#   assign=False: one parameter True, one memory True, 128 parameters counted,
#     the first step of AdamW at lr 0.01 moves an element by up to 0.0100
#   assign=True: one parameter False, one memory True, 256 parameters counted,
#     the first step of AdamW at lr 0.01 moves an element by up to 0.0200
set -euo pipefail
packages=(torch==2.13.0 numpy==2.4.6)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV_CACHE:-$work}/$(printf '%s' "${packages[*]}" | cksum | cut -d ' ' -f 1)
[ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
cd "$work"
cat > check.py <<'EOF'
import io
import sys

import torch
from torch import nn


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))


def train(assign):
    torch.manual_seed(0)
    model = Tied()
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    model.load_state_dict(torch.load(saved), assign=assign)
    one_object = model.head.weight is model.embedding.weight
    one_memory = model.head.weight.data_ptr() == model.embedding.weight.data_ptr()
    before = model.embedding.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    ids = torch.arange(16)
    nn.functional.cross_entropy(model(ids), ids).backward()
    optimizer.step()
    moved = (model.embedding.weight - before).abs().max().item()
    count = sum(p.numel() for p in model.parameters())
    print(f"assign={assign}: one parameter {one_object}, one memory {one_memory}, {count} parameters counted,")
    print(f"  the first step of AdamW at lr 0.01 moves an element by up to {moved:.4f}")
    return one_object, one_memory, count, moved


print("torch", torch.__version__)
plain, assigned = train(False), train(True)
recorded = plain[:3] == (True, True, 128) and assigned[:3] == (False, True, 256)
sys.exit(0 if recorded and plain[3] < 0.0101 and assigned[3] > 0.0199 else "changed")
EOF
OMP_NUM_THREADS=1 "$venv/bin/python" check.py
