"""Tiny models, and ids for them."""

import torch

from nanochat_hf.model import NanochatConfig, NanochatForCausalLM

SIZES = dict(
    vocab_size=100,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=3,
)
# the parts that nanochat got in March 2026, with shorter windows than a third of 16 positions
LATER = dict(
    smear=True,
    backout=True,
    qk_scale=1.2,
    value_gate_channels=12,
    value_gate_scale=3.0,
    rope_theta=100000.0,
    sliding_window=9,
)


def build(**changes):
    """A model whose zero-initialised weights are not zero, so that every path shows in the logits."""
    torch.manual_seed(0)
    model = NanochatForCausalLM(NanochatConfig(**(SIZES | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def tokens(rows, positions, seed=1):
    return torch.randint(4, 100, (rows, positions), generator=torch.Generator().manual_seed(seed))
