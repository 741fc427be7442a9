"""python exact_products.py MODULE ARGUMENTS: train with Muon in float32, to compare two devices' curves."""

import functools
import runpy
import sys

import torch

from nanochat_hf import optim

optim.MuonAdamW = functools.partial(optim.MuonAdamW, orthogonalize_dtype=torch.float32)
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__")
