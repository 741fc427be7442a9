"""python exact_products.py MODULE ARGUMENTS: a training script whose Muon multiplies in float32, so that two devices' curves can be compared closely."""

import functools
import runpy
import sys

import torch

from nanochat_hf import optim

optim.MuonAdamW = functools.partial(optim.MuonAdamW, orthogonalize_dtype=torch.float32)
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__")
