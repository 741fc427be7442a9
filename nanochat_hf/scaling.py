"""From depth, the one dial, to sizes, horizons, rates, memory and time. Pure arithmetic; the rules are nanochat's."""

import math
import re
from typing import Any

import torch

from .model import NanochatConfig, NanochatForCausalLM
from .model.configuration_nanochat_hf import SMEAR_CHANNELS

# Bytes of activations that training keeps per token and channel of each layer, with the fused kernels: two
# normalised inputs, q, k, v, the attention's output, the residual stream, and the squared ReLU, 4 times as wide.
# Fitted to two measured peaks on an H100: d12 with 64 rows of 2048 takes 36.3 GiB, d20 with 32 rows 57.2 GiB
# (docs/records/2026-11-26-gradients-in-products).
LAYER_BYTES = 27.7
LOGIT_BYTES = 2 * 8192  # per token of the vocabulary: the logits of a chunk, whose memory their gradient reuses
# Dense bfloat16 peaks in FLOP/s by a part of the device's name (vendors' data sheets). The first match wins.
PEAK_FLOPS = (
    ("B200", 2.25e15),
    ("H200", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H800", 989e12),
    ("A100", 312e12), ("A800", 312e12), ("L40S", 362e12), ("L4", 121e12), ("4090", 165e12), ("3090", 71e12),
)  # fmt: skip
GIB = 2**30
# What plans assume. Measured on one H100: 41 % at d12 and 46 % at d20, without evaluation and saving.
PLANNED_MFU = 0.4


def model_config(
    depth: int,
    vocab_size: int,
    sequence_len: int = 2048,
    *,
    aspect_ratio: int = 64,
    head_dim: int = 128,
    window_pattern: str = "SSSL",
    **overrides: Any,
) -> NanochatConfig:
    """The configuration of a model `depth` layers deep, depth·aspect_ratio wide, rounded up to whole heads.

    `overrides` are further fields of NanochatConfig. Raises ValueError for a depth below 1.

    >>> config = model_config(12, 32768)
    >>> config.hidden_size, config.num_attention_heads
    (768, 6)
    """
    if depth < 1:
        raise ValueError(f"depth={depth} must be at least 1")
    width = math.ceil(depth * aspect_ratio / head_dim) * head_dim
    heads = width // head_dim
    settings: dict[str, Any] = {"num_key_value_heads": heads} | overrides
    return NanochatConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        max_position_embeddings=sequence_len,
        window_pattern=window_pattern,
        **settings,
    )


def skeleton(config: NanochatConfig) -> NanochatForCausalLM:
    """The model of `config` on the meta device: it has shapes but no memory, and takes milliseconds at any depth."""
    with torch.device("meta"):
        return NanochatForCausalLM(config)


def parameter_counts(model: NanochatForCausalLM) -> dict[str, int]:
    """Number of parameters by kind: embedding, value_embedding, head, scalar (smear too), matrix, and total."""
    counts = dict.fromkeys(("embedding", "value_embedding", "head", "scalar", "matrix"), 0)
    for name, parameter in model.named_parameters():
        if "value_embeds" in name:
            kind = "value_embedding"
        elif "embed_tokens" in name:
            kind = "embedding"
        elif "lm_head" in name:
            kind = "head"
        else:
            kind = "scalar" if parameter.ndim < 2 or "smear" in name else "matrix"
        counts[kind] += parameter.numel()
    return counts | {"total": sum(counts.values())}


def flops_per_token(model: NanochatForCausalLM, positions: int) -> int:
    """FLOPs of forward and backward for one token in rows of `positions` tokens.

    6 per weight of a matrix, the head or the gate of smear, and 12·H·D·keys per layer for attention (PaLM,
    arXiv:2204.02311, appendix B).
    """
    config, counts = model.config, parameter_counts(model)
    heads = config.num_attention_heads * config.head_dim
    attention = 0
    for kind in config.layer_types:
        window = config.sliding_window - 1 if kind == "sliding_attention" else positions
        attention += 12 * heads * min(window, positions)
    smear = SMEAR_CHANNELS if config.smear else 0
    return 6 * (counts["matrix"] + counts["head"] + smear) + attention


def training_horizon(
    num_params: int,
    flops: float,
    batch_tokens: int,
    *,
    num_steps: int | None = None,
    target_flops: float | None = None,
    ratio: float = 10.5,
) -> int:
    """Optimizer steps of a base run: `num_steps` if given, else by `target_flops` if given, else by `ratio`.

    `num_params` counts matrices and head; `ratio` is tokens per such parameter; `flops` are those of one token;
    `batch_tokens` are tokens of a step. Raises ValueError for less than one step.

    >>> training_horizon(1000, 6000, 100)
    105
    """
    if num_steps is not None:
        steps = num_steps
    elif target_flops is not None:
        if not 0 < target_flops < math.inf:
            raise ValueError(
                f"--target-flops {target_flops:g} must be above 0; "
                "1e18 is about an hour of an H100 at a third of its peak"
            )
        steps = round(target_flops / (flops * batch_tokens))
    else:
        steps = int(ratio * num_params) // batch_tokens
    if steps < 1:
        raise ValueError(
            f"the horizon is {steps} steps of {batch_tokens} tokens; raise --num-steps, --target-flops or "
            "--target-param-data-ratio, or lower --total-batch-size"
        )
    return steps


def memory_per_gpu(model: NanochatForCausalLM, rows: int, positions: int, gpus: int = 1) -> dict[str, float]:
    """Estimated peak in GiB of one GPU under DDP: weights, gradients, optimizer, activations, total.

    Weights and gradients are float32; with several GPUs DDP holds its buckets beside the gradients. AdamW keeps two
    numbers per parameter and Muon one, divided among the GPUs. All weights but the embedding also exist in bfloat16.
    Activations follow LAYER_BYTES, without gradient checkpointing.
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


def peak_of(name: str) -> float | None:
    """Dense bfloat16 FLOP/s by a device's name, in upper or lower case; None if it is unknown.

    >>> peak_of("h100")
    989000000000000.0
    """
    # no digit may follow: an L40 is no L4, an A1000 no A100
    return next((peak for part, peak in PEAK_FLOPS if re.search(rf"{part}(?!\d)", name, re.IGNORECASE)), None)


def training_hours(flops: float, peak: float, gpus: int, mfu: float) -> float:
    """Hours that `flops` take on `gpus` devices of `peak` FLOP/s each, at the model FLOPs utilisation `mfu`.

    >>> training_hours(3.6e18, 1e15, 2, 0.5)
    1.0
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu={mfu} must lie above 0 and at most at 1; 0.4 is usual")
    return flops / (peak * gpus * mfu) / 3600


def shown_hours(hours: float) -> str:
    """A time as a person reads it.

    >>> shown_hours(0.08), shown_hours(2.5)
    ('4.8 min', '2.50 h')
    """
    return f"{hours:.2f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def describe(
    model: NanochatForCausalLM, rows: int, positions: int, gpus: int, batch_tokens: int, num_steps: int
) -> dict[str, str]:
    """One line each about parameters, compute, steps and memory, as plans print them."""
    counts, memory = parameter_counts(model), memory_per_gpu(model, rows, positions, gpus)
    flops = flops_per_token(model, positions)
    micro = max(1, batch_tokens // (rows * positions * gpus))
    kinds = ", ".join(f"{kind} {n:,}" for kind, n in counts.items() if kind != "total")
    parts = ", ".join(f"{kind} {gib:.1f}" for kind, gib in memory.items() if kind != "total")
    return {
        "parameters": f"{counts['total']:,} ({kinds})",
        "compute": f"{flops:.3g} FLOPs per token, {flops * batch_tokens * num_steps:.3g} in all",
        "steps": f"{num_steps:,} of {batch_tokens:,} tokens ({micro} micro-batches of {rows} rows × {positions} "
        f"positions on {gpus} processes), {batch_tokens * num_steps:,} tokens in all",
        "memory": f"about {memory['total']:.1f} GiB a device ({parts})",
    }


def accumulation_steps(total_batch_size: int | None, rows: int, positions: int, processes: int) -> int:
    """Micro-batches of an optimizer step; 1 if no size is given. Raises ValueError if the size is no multiple of one.

    >>> accumulation_steps(524288, 32, 2048, 1)
    8
    """
    micro = rows * positions * processes
    if total_batch_size is None:
        return 1
    if total_batch_size < 1 or total_batch_size % micro:
        nearest = max(1, round(total_batch_size / micro)) * micro
        raise ValueError(
            f"--total-batch-size {total_batch_size} must be a multiple of {micro} (rows × positions × processes); "
            f"try {nearest}"
        )
    return total_batch_size // micro


def batch_lr_scale(total_batch_size: int) -> float:
    """Factor of a base run's learning rates: √(tokens of a step / 2^19)."""
    return math.sqrt(total_batch_size / 2**19)


def base_weight_decay(depth: int, weight_decay: float = 0.2) -> float:
    """Muon's weight decay in a base run, which falls with depth: weight_decay·(12/depth)²."""
    return weight_decay * (12 / depth) ** 2


def auto_batch(tokens: float, tokens_at_12: float) -> int:
    """Tokens of a step for a run of so many tokens: 2^19·(tokens / those of depth 12)^0.383, to a power of two.

    >>> [auto_batch(ratio, 1.0) for ratio in (0.4, 1.0, 4.0, 12.0)]
    [262144, 524288, 1048576, 1048576]
    """
    return 2 ** round(math.log2(2**19 * (tokens / tokens_at_12) ** 0.383))


def decay_by_data(weight_decay: float, batch: int, tokens: float, tokens_at_12: float) -> float:
    """Muon's weight decay by the run's length: weight_decay·√(batch / 2^19)·(tokens at depth 12 / tokens).

    >>> decay_by_data(0.28, 2**21, 4.0, 1.0)
    0.14
    """
    return weight_decay * batch_lr_scale(batch) * tokens_at_12 / tokens


def counted_parameters(config: NanochatConfig) -> int:
    """The parameters by which base runs are measured in tokens: matrices of the layers, and the head."""
    counts = parameter_counts(skeleton(config))
    return counts["matrix"] + counts["head"]
