"""Tests never reach for the Hub and use one thread, so that they fit beside each other on two cores."""

import os
import sys

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, where it is installed at all


@pytest.fixture(autouse=True)
def compiled_anew():
    """Forget compiled functions after each test.

    They count towards dynamo's limit, so whether a later test met it would depend on the order of tests.
    """
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
