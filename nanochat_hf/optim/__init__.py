"""Muon for the matrices and AdamW for the rest, in one optimizer whose compute and state are shared among processes."""

from nanochat_hf.optim.groups import (
    MATRIX_OPTIMIZERS,
    OptimizerConfig,
    apply_schedule,
    build_param_groups,
    gradient_norms,
)
from nanochat_hf.optim.optimizer import MuonAdamW

__all__ = [
    "MATRIX_OPTIMIZERS",
    "MuonAdamW",
    "OptimizerConfig",
    "apply_schedule",
    "build_param_groups",
    "gradient_norms",
]
