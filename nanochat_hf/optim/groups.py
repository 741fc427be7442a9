"""Parameter groups: which rule owns which parameter, and with which learning rate."""

import re
from dataclasses import dataclass, fields

import torch
from torch import nn

from nanochat_hf.optim.sharding import whole

# First match wins. A parameter that no rule takes and a rule that takes no parameter are both errors, so that a
# renamed module cannot silently change its optimizer.
RULES = (
    (r"(^|\.)lm_head\.weight$", "unembedding"),
    (r"(^|\.)embed_tokens\.weight$", "embedding"),
    (r"(^|\.)value_embeds\.\d+\.weight$", "value_embeds"),
    (r"(^|\.)resid_lambdas$", "resid_lambdas"),
    (r"(^|\.)x0_lambdas$", "x0_lambdas"),
    (r"(^|\.)layers\.\d+\..*\.weight$", "matrix"),
)
ADAMW_EPS = 1e-10
MUON_BETA2 = 0.95
PLAIN_ADAMW = {
    "betas": (0.9, 0.95),
    "eps": 1e-8,
}  # what language models are usually trained with (GPT-3, arXiv:2005.14165)
MATRIX_OPTIMIZERS = ("muon", "adamw")


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates before any schedule, as tuned at a width of 768 and 2^19 tokens a step.

    `embedding_lr` (token and value embeddings) and `unembedding_lr` are further scaled by (width / 768)^-0.5.
    `weight_decay` is the matrices' only, as used (a base run passes 0.2 * (12 / depth)^2). `batch_lr_scale` multiplies every
    learning rate; sqrt(tokens per step / 2^19) is the rule for base runs. `matrix_optimizer` "adamw" is the baseline that Muon is
    measured against: it changes the rule of the matrices and nothing else, and wants a `matrix_lr` some ten times smaller.
    """

    embedding_lr: float = 0.3
    unembedding_lr: float = 0.004
    matrix_lr: float = 0.02
    scalar_lr: float = 0.5
    weight_decay: float = 0.0
    batch_lr_scale: float = 1.0
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


def assign_rules(names, rules=RULES) -> dict[str, list[str]]:
    """Give each parameter name to the first rule that matches.

    `["lm_head.weight", "layers.0.mlp.up_proj.weight"]` → `{"unembedding": ["lm_head.weight"], "matrix": [...]}`.
    Raises ValueError for a name that no rule takes and for a rule that takes no name.
    """
    owned = {owner: [] for _, owner in rules}
    for name in names:
        owner = next((owner for pattern, owner in rules if re.search(pattern, name)), None)
        if owner is None:
            raise ValueError(f"parameter {name} is taken by no optimizer rule; add a rule to optim/groups.py")
        owned[owner].append(name)
    for pattern, owner in rules:
        if not owned[owner]:
            raise ValueError(f"optimizer rule {owner} ({pattern}) takes no parameter; remove it or fix its pattern")
    return owned


def build_param_groups(model: nn.Module, config: OptimizerConfig | None = None) -> list[dict]:
    """Parameter groups for `MuonAdamW`: five of AdamW, then one per matrix shape, of Muon or (the baseline) of plain AdamW.

    Each group holds kind ("adamw" or "muon"), name, param_names, lr, initial_lr, momentum, betas, eps, weight_decay,
    initial_weight_decay and params. Frozen parameters are left out. The width is read from `model.config.hidden_size`.
    Raises ValueError if a parameter has no rule, a rule no parameter, or a Muon parameter is not a matrix.
    """
    config = config or OptimizerConfig()
    named = dict(model.named_parameters())
    model_config = getattr(model, "module", model).config
    with_tables = getattr(model_config, "use_value_embeddings", True)
    # a rule for tables that the model says it has not would be idle rightly
    owned = {"value_embeds": []} | assign_rules(
        named, [rule for rule in RULES if with_tables or rule[1] != "value_embeds"]
    )
    width_scale = (model_config.hidden_size / 768) ** -0.5
    adamw = {  # name: (learning rate, betas)
        "unembedding": (config.unembedding_lr * width_scale, (0.8, 0.95)),
        "embedding": (config.embedding_lr * width_scale, (0.8, 0.95)),
        "value_embeds": (config.embedding_lr * width_scale, (0.8, 0.95)),
        # every block multiplies the residual by its lambda, so an error compounds over depth: a hundredth of the rate
        "resid_lambdas": (config.scalar_lr * 0.01, (0.8, 0.95)),
        "x0_lambdas": (config.scalar_lr, (0.96, 0.95)),
    }
    groups = []
    for owner, (lr, betas) in adamw.items():
        trained = {name: named[name] for name in owned[owner] if named[name].requires_grad}
        groups.append(_group("adamw", owner, trained, lr * config.batch_lr_scale, betas, 0.0))
    for shape, trained in _by_shape(named, owned["matrix"]).items():
        lr, betas = config.matrix_lr * config.batch_lr_scale, (0.0, MUON_BETA2)
        group = _group(
            config.matrix_optimizer, f"matrix_{shape[0]}x{shape[1]}", trained, lr, betas, config.weight_decay
        )
        groups.append(group | PLAIN_ADAMW if config.matrix_optimizer == "adamw" else group)
    return [group for group in groups if group["params"]]


def _by_shape(named, names) -> dict[tuple, dict]:
    stacks = {}
    for name in names:
        param = named[name]
        if param.ndim != 2:
            raise ValueError(f"{name} has shape {tuple(param.shape)}, Muon takes matrices; give it an AdamW rule")
        if param.requires_grad:
            stacks.setdefault(tuple(param.shape), {})[name] = param
    return stacks


def _group(kind, name, named, lr, betas, weight_decay) -> dict:
    return {
        "kind": kind,
        "name": name,
        "params": list(named.values()),
        "param_names": list(named),
        "lr": lr,
        "initial_lr": lr,
        "momentum": 0.95 if kind == "muon" else 0.0,
        "betas": betas,
        "eps": ADAMW_EPS,
        "weight_decay": weight_decay,
        "initial_weight_decay": weight_decay,
    }


def gradient_norms(optimizer) -> dict[str, torch.Tensor]:
    """Norm of each group's gradient, {group name: 0-d tensor on the device}; a collective where parameters are DTensors."""
    norms = {}
    for group in optimizer.param_groups:
        grads = [param.grad for param in group["params"] if param.grad is not None]
        if grads:
            norms[group["name"]] = whole(torch.nn.utils.get_total_norm(grads))
    return norms


def apply_schedule(optimizer, lr_multiplier: float, momentum: float, weight_decay_multiplier: float = 1.0) -> None:
    """Set this step's hyperparameters, before `optimizer.step()`.

    Every group's lr becomes initial_lr * lr_multiplier; Muon groups also get `momentum` and their initial weight decay
    times `weight_decay_multiplier`. Takes any wrapper that exposes `param_groups`.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr_multiplier
        if group["kind"] == "muon":
            group["momentum"] = momentum
            group["weight_decay"] = group["initial_weight_decay"] * weight_decay_multiplier
