"""From the one dial, depth, to sizes, horizons, rates, memory and time. Pure arithmetic (reference: nanochat; see docs/log.md)."""

import math
import re

import torch

from .model import NanochatConfig, NanochatForCausalLM

# Bytes of activations that training keeps for each token and channel: in each layer (two normed inputs, q, k, v, the attention's output, the
# residual stream, and four channels' worth of squared ReLU), with the fused kernels. Fitted to two peaks on an H100 (docs/log.md): d12 with 64
# rows of 2048 36.3 GiB, d20 with 32 rows 57.2 GiB.
LAYER_BYTES = 27.7
LOGIT_BYTES = 2 * 8192  # a token of vocabulary: a chunk's logits, which become their own gradient
# Dense bf16 peaks in FLOP/s by a part of the device's name (vendors' data sheets); first match wins.
PEAK_FLOPS = (
    ("B200", 2.25e15), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H800", 989e12),
    ("A100", 312e12), ("A800", 312e12), ("L40S", 362e12), ("L4", 121e12), ("4090", 165e12), ("3090", 71e12),
)  # fmt: skip
GIB = 2**30
PLANNED_MFU = (
    0.4  # what plans assume: 41 % at d12 and 46 % at d20 were measured on one H100, before evaluation and saving
)


def model_config(
    depth, vocab_size, sequence_len=2048, *, aspect_ratio=64, head_dim=128, window_pattern="SSSL", **overrides
):
    """depth → NanochatConfig: width = depth·aspect_ratio rounded up to whole heads of head_dim.

    model_config(12, 32768).hidden_size → 768, with 6 heads of 128.
    """
    if depth < 1:
        raise ValueError(f"depth={depth} must be at least 1")
    width = math.ceil(depth * aspect_ratio / head_dim) * head_dim
    heads = width // head_dim
    settings = dict(num_key_value_heads=heads) | overrides
    return NanochatConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        max_position_embeddings=sequence_len,
        window_pattern=window_pattern,
        **settings,
    )


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
        if not 0 < target_flops < math.inf:
            raise ValueError(
                f"--target-flops {target_flops:g} must be above 0; 1e18 is about an hour of an H100 at a third of its peak"
            )
        steps = round(target_flops / (flops * batch_tokens))
    else:
        steps = int(ratio * num_params) // batch_tokens
    if steps < 1:
        raise ValueError(
            f"the horizon is {steps} steps of {batch_tokens} tokens; raise --num-steps, --target-flops or --target-param-data-ratio, "
            "or lower --total-batch-size"
        )
    return steps


def memory_per_gpu(model, rows, positions, gpus=1):
    """Estimated peak in GiB of one GPU under DDP: {"weights", "gradients", "optimizer", "activations", "total"}.

    Weights and gradients are float32, and DDP keeps its buckets beside the gradients; AdamW holds two numbers a parameter and Muon one, divided
    among the GPUs; all but the embedding exists once more in bfloat16. The activations are calibrated, see LAYER_BYTES; without checkpointing.
    """
    config, counts = model.config, parameter_counts(model)
    rounded = counts["matrix"] + counts["head"] + counts["value_embedding"]
    tokens, width = rows * positions, config.hidden_size
    parts = {
        "weights": 4 * counts["total"] + 2 * rounded,
        "gradients": 4 * counts["total"] * (1 if gpus == 1 else 2),
        "optimizer": (8 * (counts["total"] - counts["matrix"]) + 4 * counts["matrix"]) / gpus,
        "activations": tokens * width * LAYER_BYTES * config.num_hidden_layers + LOGIT_BYTES * config.vocab_size,
    }
    return {name: size / GIB for name, size in (parts | {"total": sum(parts.values())}).items()}


def peak_of(name):
    """Dense bf16 FLOP/s by a device's name, however it is written; None where unknown. peak_of("h100") → 989e12."""
    # no digit behind: an L40 is no L4, an A1000 no A100
    return next((peak for part, peak in PEAK_FLOPS if re.search(rf"{part}(?!\d)", name, re.IGNORECASE)), None)


def training_hours(flops, peak, gpus, mfu):
    """Hours of `flops` on `gpus` devices of `peak` FLOP/s each, at the model FLOPs utilisation `mfu`: training_hours(3.6e18, 1e15, 2, 0.5) → 1.0."""
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu={mfu} must lie above 0 and at most at 1; 0.4 is usual")
    return flops / (peak * gpus * mfu) / 3600


def shown_hours(hours):
    """shown_hours(0.08) → "4.8 min", shown_hours(2.5) → "2.50 h"."""
    return f"{hours:.2f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def describe(model, rows, positions, gpus, batch_tokens, num_steps):
    """{"parameters", "compute", "steps", "memory"} → a line each, as the plan and the training scripts print them."""
    counts, flops, memory = (
        parameter_counts(model),
        flops_per_token(model, positions),
        memory_per_gpu(model, rows, positions, gpus),
    )
    micro = max(1, batch_tokens // (rows * positions * gpus))
    return {
        "parameters": f"{counts['total']:,} ({', '.join(f'{kind} {n:,}' for kind, n in counts.items() if kind != 'total')})",
        "compute": f"{flops:.3g} FLOPs per token, {flops * batch_tokens * num_steps:.3g} in all",
        "steps": f"{num_steps:,} of {batch_tokens:,} tokens ({micro} micro-batches of {rows} rows × {positions} positions on {gpus} processes), "
        f"{batch_tokens * num_steps:,} tokens in all",
        "memory": f"about {memory['total']:.1f} GiB a device ({', '.join(f'{kind} {gib:.1f}' for kind, gib in memory.items() if kind != 'total')})",
    }


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
