"""nanochat's `model_config` ↔ NanochatConfig."""

from collections.abc import Mapping
from typing import Any

from nanochat_hf.recipes import ARCHITECTURES

from ..model import NanochatConfig
from .names import Weights

FIELDS = {  # the reference's name → ours
    "sequence_len": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "window_pattern": "window_pattern",
}
OLD_FIELDS = {"window_pattern": "L"}  # checkpoints older than the field were computed with this
# no field of nanochat sets these
FIXED = ("intermediate_size", "head_dim", "layer_types", "sliding_window", "rms_norm_eps", "use_value_embeddings")
# Until 4 March nanochat always rounded its cosines; since then it has them in the dtype that it computes in, so in
# float32 they are exact. In bfloat16 both are the same.
ROUNDED = "feb2026"


def config_from_nanochat(
    fields: object, weights: Weights | None = None, architecture: str = "feb2026", sequence_len: int | None = None
) -> NanochatConfig:
    """nanochat's `model_config`, a dict → NanochatConfig of an architecture in ARCHITECTURES.

    `weights`, the state dict, tells what no field does: checkpoints of 2025 have no value embeddings, and their tables
    have no padding. `sequence_len` replaces the one of the fields, which sets the windows.

    Raises ValueError where a field is missing or a size is impossible.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"model_config holds {type(fields).__name__}; it must be an object with {', '.join(FIELDS)}")
    given: dict[str, Any] = OLD_FIELDS | {"n_kv_head": fields.get("n_head")} | fields
    given |= {} if sequence_len is None else {"sequence_len": sequence_len}
    missing = [name for name in FIELDS if given.get(name) is None]
    if missing:
        raise ValueError(f"model_config lacks {', '.join(missing)}; is this a checkpoint of nanochat?")
    for name in FIELDS.keys() - {"window_pattern"}:
        if type(given[name]) is not int or given[name] < 1:
            raise ValueError(f"model_config: {name}={given[name]!r} must be a positive whole number")
    if not isinstance(given["window_pattern"], str):
        raise ValueError(f"model_config: window_pattern={given['window_pattern']!r} must be text made of S and L")
    settings: dict[str, Any] = {ours: given[theirs] for theirs, ours in FIELDS.items()}
    settings |= {**ARCHITECTURES[architecture], "rope_in_bfloat16": architecture == ROUNDED}
    if weights is not None:
        settings["use_value_embeddings"] = any(
            name.startswith("value_embeds.") or "ve_gate" in name for name in weights
        )
        if len(weights.get("lm_head.weight", ())) == given["vocab_size"]:
            settings["pad_vocab_to_multiple_of"] = 1
    return NanochatConfig(**settings)


def config_to_nanochat(config: NanochatConfig, of_2025: bool = False) -> tuple[dict[str, Any], str]:
    """NanochatConfig → nanochat's `model_config`, and the name of the architecture that computes it.

    `of_2025`: the model came from a nanochat without value embeddings, so it may lack them.

    Raises ValueError for a setting that no nanochat computes with.
    """
    fields = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    found = {name: _differences(config, fields, name, of_2025) for name in ARCHITECTURES}
    nearest = min(found, key=lambda name: len(found[name]))
    for name, (own, theirs) in found[nearest].items():
        raise ValueError(
            f"{name}={own} cannot be told to nanochat, which would compute with {theirs}; export a model made with that"
        )
    return fields, nearest


def _differences(config: NanochatConfig, fields: Mapping[str, Any], architecture: str, of_2025: bool) -> dict[str, Any]:
    # {setting: (ours, what nanochat would compute with)}
    expected = config_from_nanochat(dict(fields), architecture=architecture)
    names = [*FIXED, *ARCHITECTURES[architecture]]
    names += ["rope_in_bfloat16"] if architecture == ROUNDED else []
    pairs = {name: (getattr(config, name), getattr(expected, name)) for name in names}
    if of_2025:
        del pairs["use_value_embeddings"]
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
