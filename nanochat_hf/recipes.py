"""nanochat's recipes by date, as data: {flag: value}. `--recipe NAME` makes them the defaults of the flags.

Architecture fields have the names of NanochatConfig, the others those of base_train's flags; docs/base.md tells what
each does.
"""

from collections.abc import Mapping
from typing import Any

Values = Mapping[str, Any]

# What the forward pass computes, by nanochat's dates.
_FEBRUARY: Values = {
    "final_logit_softcapping": 15.0,
    "rope_theta": 1e4,
    "qk_scale": 1.0,
    "window_rule": "half",
    "value_gate_channels": 32,
    "value_gate_scale": 2.0,
    "smear": False,
    "backout": False,
}
_GATES: Values = {
    "rope_theta": 1e5,
    "qk_scale": 1.15,
    "window_rule": "third",
    "value_gate_channels": 12,
    "value_gate_scale": 3.0,
}
_SMEAR: Values = {"qk_scale": 1.2, "window_rule": "quarter", "smear": True, "backout": True}
# Two of them were there for some days only: there are checkpoints of them, but no recipes.
ARCHITECTURES: dict[str, Values] = {
    "feb2026": _FEBRUARY,  # 18 January to 3 March
    "mar2026-cap20": {**_FEBRUARY, "final_logit_softcapping": 20.0},  # 3 to 9 March
    "mar2026-gates": {**_FEBRUARY, **_GATES},  # 9 to 14 March
    "mar2026": {**_FEBRUARY, **_GATES, **_SMEAR},  # since 14 March
}

_FEBRUARY_START: Values = {
    "embedding_std": 1.0,
    "mlp_init_scale": 1.0,
    "value_gate_init": 0.0,
    "resid_lambda_first": 1.0,
    "resid_lambda_last": 1.0,
    "x0_lambda_first": 0.1,
    "x0_lambda_last": 0.1,
}
_FEBRUARY_TRAINING: Values = {
    # rates before the scalings by width and batch, decays, betas
    "unembedding_lr": 0.004,
    "embedding_lr": 0.3,
    "value_embeds_lr": 0.3,
    "matrix_lr": 0.02,
    "scalar_lr": 0.5,
    "smear_lr": 0.2,
    "unembedding_decay": 0.0,
    "embedding_decay": 0.0,
    "value_embeds_decay": 0.0,
    "resid_decay": 0.0,
    "unembedding_beta2": 0.95,
    "embedding_beta2": 0.95,
    "muon_beta2": 0.95,
    "muon_margin": 0.02,
    "muon_eq": False,
    "muon_plus": False,
    "weight_decay": 0.2,
    "decay_rule": "depth",
    # schedules
    "rate_at": "start",
    "warmup_steps": 0,
    "warmdown_ratio": 0.5,
    "final_lr_frac": 0.0,
    "momentum": 0.95,
    "momentum_warmup_steps": 300,
    "momentum_final": 0.95,
    "decay_shape": "linear",
    # length, batch, text
    "total_batch_size": 2**19,
    "auto_batch": False,
    "target_param_data_ratio": 10.5,
    "data": "karpathy/fineweb-edu-100b-shuffle",
}
_MARCH_START: Values = {
    "embedding_std": 0.8,
    "mlp_init_scale": 0.4,
    "value_gate_init": 0.02,
    "resid_lambda_first": 1.15,
    "resid_lambda_last": 1.05,
    "x0_lambda_first": 0.20,
    "x0_lambda_last": 0.05,
}
_MARCH_TRAINING: Values = {
    **_FEBRUARY_TRAINING,
    "unembedding_lr": 0.008,
    "value_embeds_lr": 0.15,
    "unembedding_decay": 0.01,
    "embedding_decay": 0.001,
    "value_embeds_decay": 0.01,
    "resid_decay": 0.05,
    "unembedding_beta2": 0.96,
    "embedding_beta2": 0.995,
    "muon_beta2": 0.9,
    "muon_margin": 0.01,
    "weight_decay": 0.28,
    "decay_rule": "data",
    "warmup_steps": 40,
    "warmdown_ratio": 0.65,
    "final_lr_frac": 0.05,
    "momentum": 0.97,
    "momentum_warmup_steps": 400,
    "momentum_final": 0.90,
    "decay_shape": "cosine",
    "total_batch_size": None,
    "auto_batch": True,
    "target_param_data_ratio": 12.0,
    "data": "karpathy/climbmix-400b-shuffle",
}
RECIPES: dict[str, Values] = {
    "feb2026": {**_FEBRUARY, **_FEBRUARY_START, **_FEBRUARY_TRAINING},
    "mar2026": {**ARCHITECTURES["mar2026"], **_MARCH_START, **_MARCH_TRAINING},
    "head": {**ARCHITECTURES["mar2026"], **_MARCH_START, **_MARCH_TRAINING, "muon_eq": True, "muon_plus": True},
}
