"""Parameter groups: which rule owns which parameter, and with which learning rate."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import nn

from nanochat_hf.optim.sharding import whole

# The first match wins. A parameter without a rule and a rule without a parameter are both errors, so that renaming a
# module cannot silently change its optimizer.
RULES = (
    (r"(^|\.)lm_head\.weight$", "unembedding"),
    (r"(^|\.)embed_tokens\.weight$", "embedding"),
    (r"(^|\.)value_embeds\.\d+\.weight$", "value_embeds"),
    (r"(^|\.)resid_lambdas$", "resid_lambdas"),
    (r"(^|\.)x0_lambdas$", "x0_lambdas"),
    (r"(^|\.)(smear\.(gate\.weight|strength)|backout_lambda)$", "smear_and_backout"),
    (r"(^|\.)layers\.\d+\..*\.weight$", "matrix"),
)
ADAMW_EPS = 1e-10
SCALARS = ("resid_lambdas", "x0_lambdas")  # groups whose first gradients are rounding noise, see apply_schedule
# what language models are usually trained with (GPT-3, arXiv:2005.14165)
PLAIN_ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8}
MATRIX_OPTIMIZERS = ("muon", "adamw")


class HasGroups(Protocol):
    """An optimizer, or a wrapper that shows its groups."""

    param_groups: list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates before any schedule, as tuned at a width of 768 and 2^19 tokens a step.

    `embedding_lr`, `value_embeds_lr` (None: as embedding_lr) and `unembedding_lr` are also scaled by
    (width / 768)^-0.5. `weight_decay` is for matrices only, as it is; AdamW's groups have a decay each (`*_decay`).
    `batch_lr_scale` multiplies every learning rate but `smear_lr`; a base run takes sqrt(tokens per step / 2^19).
    `init_lr_frac` multiplies them all. `matrix_optimizer` "adamw" is the baseline to measure Muon against: only the
    matrices' rule changes, and `matrix_lr` should be some ten times smaller.

    `muon_beta2` is that of the variance reduction, `muon_margin` the share by which the norm is raised before
    orthogonalisation. `muon_eq` first gives all rows of a matrix one norm (MuonEq), `muon_plus` gives the result the
    norm that an orthogonal matrix has (Muon+). `scalar_eps` is AdamW's epsilon for the residual scalars: above
    their gradients' rounding it is a floor under the second moment.
    """

    embedding_lr: float = 0.3
    value_embeds_lr: float | None = None
    unembedding_lr: float = 0.004
    matrix_lr: float = 0.02
    scalar_lr: float = 0.5
    smear_lr: float = 0.2
    weight_decay: float = 0.0
    unembedding_decay: float = 0.0
    embedding_decay: float = 0.0
    value_embeds_decay: float = 0.0
    resid_decay: float = 0.0
    unembedding_beta2: float = 0.95
    embedding_beta2: float = 0.95
    scalar_eps: float = ADAMW_EPS
    muon_beta2: float = 0.95
    muon_margin: float = 0.02
    muon_eq: bool = False
    muon_plus: bool = False
    batch_lr_scale: float = 1.0
    init_lr_frac: float = 1.0
    matrix_optimizer: str = "muon"

    def __post_init__(self):
        if self.matrix_optimizer not in MATRIX_OPTIMIZERS:
            raise ValueError(
                f"matrix_optimizer={self.matrix_optimizer} is unknown; choose from {', '.join(MATRIX_OPTIMIZERS)}"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and not 0 <= value < float("inf"):
                raise ValueError(f"{field.name}={value} must be a finite number of at least 0; try {field.default}")
            if field.name.endswith("beta2") and value >= 1:
                raise ValueError(f"{field.name}={value} must be below 1; try {field.default}")


def assign_rules(names: Iterable[str], rules: Sequence[tuple[str, str]] = RULES) -> dict[str, list[str]]:
    """Give each parameter's name to the first rule that matches; `rules` are pairs of a pattern and the owner's name.

    Raises ValueError for a name that no rule takes, and for a rule that takes no name.

    >>> assign_rules(["lm_head.weight", "layers.0.up_proj.weight"], [("lm_head", "unembedding"), ("layers", "matrix")])
    {'unembedding': ['lm_head.weight'], 'matrix': ['layers.0.up_proj.weight']}
    """
    owned: dict[str, list[str]] = {owner: [] for _, owner in rules}
    for name in names:
        owner = next((owner for pattern, owner in rules if re.search(pattern, name)), None)
        if owner is None:
            raise ValueError(f"parameter {name} is taken by no optimizer rule; add a rule to optim/groups.py")
        owned[owner].append(name)
    for pattern, owner in rules:
        if not owned[owner]:
            raise ValueError(f"optimizer rule {owner} ({pattern}) takes no parameter; remove it or fix its pattern")
    return owned


def build_param_groups(model: nn.Module, config: OptimizerConfig | None = None) -> list[dict[str, Any]]:
    """Parameter groups for `MuonAdamW`: up to six of AdamW, then one per matrix shape, of Muon or of AdamW.

    Each group holds kind ("adamw" or "muon"), name, param_names, lr, initial_lr, momentum, betas, eps, weight_decay,
    initial_weight_decay and params. Frozen parameters are left out. The width is read from `model.config.hidden_size`.
    Raises ValueError if a parameter has no rule, a rule no parameter, or a Muon parameter is not a matrix.
    """
    config = config or OptimizerConfig()
    named = dict(model.named_parameters())
    model_config: Any = getattr(model, "module", model).config
    # a model without these parts has no use for their rules, which would otherwise be errors
    absent = set() if getattr(model_config, "use_value_embeddings", True) else {"value_embeds"}
    if not (getattr(model_config, "smear", False) or getattr(model_config, "backout", False)):
        absent.add("smear_and_backout")
    owned = {name: [] for name in absent} | assign_rules(named, [rule for rule in RULES if rule[1] not in absent])
    scale = config.batch_lr_scale * config.init_lr_frac
    groups = []
    for owner, settings in _adamw_settings(config, model_config.hidden_size).items():
        trained = {name: named[name] for name in owned[owner] if named[name].requires_grad}
        lr = settings.pop("lr") * (config.init_lr_frac if owner == "smear_and_backout" else scale)
        groups.append(_group("adamw", owner, trained, lr) | settings)
    for shape, trained in _by_shape(named, owned["matrix"]).items():
        name = f"matrix_{shape[0]}x{shape[1]}"
        group = _group(config.matrix_optimizer, name, trained, config.matrix_lr * scale)
        group |= {"weight_decay": config.weight_decay, "initial_weight_decay": config.weight_decay}
        groups.append(group | (PLAIN_ADAMW if config.matrix_optimizer == "adamw" else _muon_settings(config)))
    return [group for group in groups if group["params"]]


def _adamw_settings(config: OptimizerConfig, width: int) -> dict[str, dict[str, Any]]:
    # {group: learning rate and AdamW's other numbers}
    narrower = (width / 768) ** -0.5
    value_lr = config.embedding_lr if config.value_embeds_lr is None else config.value_embeds_lr

    def settings(lr: float, betas: tuple[float, float], decay: float = 0.0, eps: float = ADAMW_EPS) -> dict[str, Any]:
        return {"lr": lr, "betas": betas, "eps": eps, "weight_decay": decay, "initial_weight_decay": decay}

    tables = (0.8, config.embedding_beta2)
    return {
        "unembedding": settings(
            config.unembedding_lr * narrower, (0.8, config.unembedding_beta2), config.unembedding_decay
        ),
        "embedding": settings(config.embedding_lr * narrower, tables, config.embedding_decay),
        "value_embeds": settings(value_lr * narrower, tables, config.value_embeds_decay),
        # every block multiplies the residual stream by its lambda, so changes compound over depth: 1 % of the rate
        "resid_lambdas": settings(config.scalar_lr * 0.01, (0.8, 0.95), config.resid_decay, config.scalar_eps),
        "x0_lambdas": settings(config.scalar_lr, (0.96, 0.95), eps=config.scalar_eps),
        "smear_and_backout": settings(config.smear_lr, (0.8, 0.95)),
    }


def _muon_settings(config: OptimizerConfig) -> dict[str, Any]:
    return {
        "betas": (0.0, config.muon_beta2),
        "muon_margin": config.muon_margin,
        "muon_eq": config.muon_eq,
        "muon_plus": config.muon_plus,
    }


def _by_shape(
    named: Mapping[str, nn.Parameter], names: Iterable[str]
) -> dict[tuple[int, ...], dict[str, nn.Parameter]]:
    stacks: dict[tuple[int, ...], dict[str, nn.Parameter]] = {}
    for name in names:
        param = named[name]
        if param.ndim != 2:
            raise ValueError(f"{name} has shape {tuple(param.shape)}, Muon takes matrices; give it an AdamW rule")
        if param.requires_grad:
            stacks.setdefault(tuple(param.shape), {})[name] = param
    return stacks


def _group(kind: str, name: str, named: Mapping[str, nn.Parameter], lr: float) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": name,
        "params": list(named.values()),
        "param_names": list(named),
        "lr": lr,
        "initial_lr": lr,
        "momentum": 0.95 if kind == "muon" else 0.0,
        "eps": ADAMW_EPS,
        "weight_decay": 0.0,
        "initial_weight_decay": 0.0,
    }


def gradient_norms(optimizer: HasGroups) -> dict[str, torch.Tensor]:
    """Norm of each group's gradient by the group's name, 0-d on the device; a collective if parameters are DTensors."""
    norms = {}
    for group in optimizer.param_groups:
        grads = [param.grad for param in group["params"] if param.grad is not None]
        if grads:
            norms[group["name"]] = whole(torch.nn.utils.get_total_norm(grads))
    return norms


def apply_schedule(
    optimizer: HasGroups,
    lr_multiplier: float,
    momentum: float,
    weight_decay_multiplier: float = 1.0,
    scalar_multiplier: float = 1.0,
) -> None:
    """Set this step's hyperparameters, before `optimizer.step()`.

    Every group's lr becomes initial_lr * lr_multiplier, and that of the residual scalars also * scalar_multiplier. Muon
    groups also get `momentum` and their initial weight decay times `weight_decay_multiplier`.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr_multiplier
        if group.get("name") in SCALARS:
            group["lr"] *= scalar_multiplier
        if group["kind"] == "muon":
            group["momentum"] = momentum
            group["weight_decay"] = group["initial_weight_decay"] * weight_decay_multiplier
