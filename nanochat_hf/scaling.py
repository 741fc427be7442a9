"""From the one dial, depth, to sizes, horizons and rates. Pure arithmetic (reference: nanochat; see docs/log.md)."""

import math

import torch

from .model import NanochatConfig, NanochatForCausalLM


def model_config(depth, vocab_size, sequence_len=2048, *, aspect_ratio=64, head_dim=128, window_pattern="SSSL", **overrides):
    """depth → NanochatConfig: width = depth·aspect_ratio rounded up to whole heads of head_dim.

    model_config(12, 32768).hidden_size → 768, with 6 heads of 128.
    """
    if depth < 1:
        raise ValueError(f"depth={depth} must be at least 1")
    width = math.ceil(depth * aspect_ratio / head_dim) * head_dim
    heads = width // head_dim
    settings = dict(num_key_value_heads=heads) | overrides
    return NanochatConfig(
        vocab_size=vocab_size, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        max_position_embeddings=sequence_len, window_pattern=window_pattern, **settings,
    )  # fmt: skip


def skeleton(config):
    """The model of `config` without memory (on the meta device): shapes to count with, in milliseconds at any depth."""
    with torch.device("meta"):
        return NanochatForCausalLM(config)


def parameter_counts(model):
    """{"embedding", "value_embedding", "head", "scalar", "matrix", "total"} → number of parameters of each kind."""
    counts = dict.fromkeys(("embedding", "value_embedding", "head", "scalar", "matrix"), 0)
    for name, parameter in model.named_parameters():
        if "value_embeds" in name:
            kind = "value_embedding"
        elif "embed_tokens" in name:
            kind = "embedding"
        elif "lm_head" in name:
            kind = "head"
        else:
            kind = "scalar" if parameter.ndim < 2 else "matrix"
        counts[kind] += parameter.numel()
    return counts | {"total": sum(counts.values())}


def flops_per_token(model, positions):
    """FLOPs of forward and backward for one token in rows of `positions`: 6 per matrix weight, 12·H·D·keys for attention."""
    config, counts = model.config, parameter_counts(model)
    heads = config.num_attention_heads * config.head_dim
    attention = 0
    for kind in config.layer_types:
        window = config.sliding_window - 1 if kind == "sliding_attention" else positions
        attention += 12 * heads * min(window, positions)
    return 6 * (counts["matrix"] + counts["head"]) + attention


def training_horizon(num_params, flops, batch_tokens, *, num_steps=None, target_flops=None, ratio=10.5):
    """Optimizer steps of a base run: the first given of num_steps, target_flops, ratio (tokens per matrix + head parameter)."""
    if num_steps is not None:
        steps = num_steps
    elif target_flops is not None:
        steps = round(target_flops / (flops * batch_tokens))
    else:
        steps = int(ratio * num_params) // batch_tokens
    if steps < 1:
        raise ValueError(f"the horizon is {steps} steps of {batch_tokens} tokens; raise --num-steps or lower --total-batch-size")
    return steps


def accumulation_steps(total_batch_size, rows, positions, processes):
    """Micro-batches per optimizer step. accumulation_steps(524288, 32, 2048, 1) → 8; ValueError where it does not divide."""
    micro = rows * positions * processes
    if total_batch_size is None:
        return 1
    if total_batch_size < 1 or total_batch_size % micro:
        nearest = max(1, round(total_batch_size / micro)) * micro
        raise ValueError(
            f"--total-batch-size {total_batch_size} must be a multiple of {micro} (rows × positions × processes); try {nearest}"
        )
    return total_batch_size // micro


def batch_lr_scale(total_batch_size):
    """Base training's learning rates grow with √(batch tokens / 2^19)."""
    return math.sqrt(total_batch_size / 2**19)


def base_weight_decay(depth, weight_decay=0.2):
    """Muon's weight decay falls with depth: 0.2·(12/depth)²."""
    return weight_decay * (12 / depth) ** 2
