"""The loss by its kernel in every precision, and rows that a program holds whole or not."""

import pytest
import torch

from nanochat_hf.model.ops_nanochat_hf import nll_and_slope
from tests.support.kernels import DEVICE, relative, triton


@triton
@pytest.mark.parametrize("vocab", [300, 5000, 16384, 40000, 65536])  # rows that a program holds whole, and longer ones
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)]
)  # bfloat16 is rounded twice
def test_cross_entropy_kernel(dtype, tolerance, vocab):
    from nanochat_hf.kernels.ops.softcapped_nll import softcapped_nll_

    torch.manual_seed(0)
    logits = (torch.randn(9, vocab, device=DEVICE) * 20).to(dtype)
    target, weight = torch.randint(vocab, (9,), device=DEVICE), torch.rand(9, device=DEVICE)
    target[3] = -100
    nll, slope = nll_and_slope(logits.float(), target, weight, 15.0)
    assert relative(softcapped_nll_(logits, target, weight, 15.0), nll) < tolerance
    assert relative(logits, slope) < tolerance  # in place
