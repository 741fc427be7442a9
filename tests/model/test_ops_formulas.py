"""The formulas of operations that torch has in another form."""

import torch
import torch.nn.functional as F

from nanochat_hf.model.ops_nanochat_hf import nll_and_slope


def test_nll_and_slope_is_cross_entropy_of_capped_logits():
    torch.manual_seed(0)
    logits, target, weight = (torch.randn(9, 50) * 20).requires_grad_(), torch.randint(50, (9,)), torch.rand(9)
    target[3] = -100
    plain = F.cross_entropy(15 * torch.tanh(logits / 15), target, ignore_index=-100, reduction="none") * weight
    plain.sum().backward()
    nll, slope = nll_and_slope(logits.detach(), target, weight, 15.0)
    torch.testing.assert_close(nll, plain.detach())
    torch.testing.assert_close(slope, logits.grad)
