"""The architecture as flags, and the recipes that set them."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nanochat_hf.model.configuration_nanochat_hf import WINDOW_RULES, NanochatConfig
from nanochat_hf.recipes import RECIPES


def _default(name: str, text: str) -> Any:
    # the model's own default, so that there is one of each
    return field(default=getattr(NanochatConfig(), name), metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class ArchitectureConfig:
    """What the model consists of and how it begins. --recipe sets all of it, and the training that belongs to it."""

    recipe: str | None = field(
        default=None,
        metadata={
            "help": f"nanochat's architecture, rates and schedules of a date: {', '.join(RECIPES)}; flags win over it "
            "(default: February's, with this package's own schedule)"
        },
    )
    aspect_ratio: int = field(default=64, metadata={"help": "width per layer"})
    head_dim: int = field(default=128, metadata={"help": "width of an attention head"})
    window_pattern: str = field(
        default="SSSL", metadata={"help": "attention windows, tiled over the layers: S short, L whole"}
    )
    window_rule: str = _default("window_rule", f"what the short window is of the sequence: {', '.join(WINDOW_RULES)}")
    rope_theta: float = _default("rope_theta", "base of the rotary embedding")
    qk_scale: float = _default("qk_scale", "factor on queries and on keys after their norm")
    final_logit_softcapping: float = _default("final_logit_softcapping", "soft-cap of the logits")
    value_gate_channels: int = _default("value_gate_channels", "channels that the gates of the value embeddings read")
    value_gate_scale: float = _default("value_gate_scale", "what those gates reach")
    smear: bool = _default("smear", "each token takes a gated share of the one before")
    backout: bool = _default("backout", "take a learnt multiple of the middle layer's stream away at the end")
    embedding_std: float = _default("embedding_std", "deviation of the token embedding at the start")
    mlp_init_scale: float = _default("mlp_init_scale", "factor on the MLP's first matrix at the start")
    value_gate_init: float = _default("value_gate_init", "gates begin uniform between 0 and this")
    resid_lambda_first: float = _default("resid_lambda_first", "residual scalar of the first layer at the start")
    resid_lambda_last: float = _default("resid_lambda_last", "and of the last layer, with a line between")
    x0_lambda_first: float = _default("x0_lambda_first", "scalar of the embedding in the first layer at the start")
    x0_lambda_last: float = _default("x0_lambda_last", "and in the last layer, with a line between")

    @property
    def architecture(self) -> dict[str, Any]:
        """The fields, as scaling.model_config takes them."""
        names = {part.name for part in fields(ArchitectureConfig)} - {"recipe"}
        return {name: value for name, value in asdict(self).items() if name in names}


def of_recipe(name: str | None, kind: Any) -> dict[str, Any]:
    """The values of a recipe that are fields of the dataclass `kind`; {} without a recipe.

    >>> of_recipe("mar2026", ArchitectureConfig)["qk_scale"]
    1.2
    """
    own = {part.name for part in fields(kind)}
    return {} if name is None else {key: value for key, value in RECIPES[name].items() if key in own}


def recipe_line(name: str | None, *configs: Any) -> dict[str, str]:
    """{"recipe": its name, and every flag that says otherwise}, for the plan of a run; {} without a recipe."""
    if name is None:
        return {}
    own = {key: value for config in configs for key, value in asdict(config).items()}
    changed = [f"{key} {own[key]}" for key, value in RECIPES[name].items() if key in own and own[key] != value]
    return {"recipe": f"{name}, but {', '.join(changed)}" if changed else name}
