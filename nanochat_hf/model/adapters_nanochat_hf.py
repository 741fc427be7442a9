"""Which layers PEFT adapts where its config names none."""

import sys
from typing import Any

# PEFT's tables, by model type; a name that a version of PEFT does not have is passed over
TARGETS = {
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING": ["q_proj", "v_proj"],
    "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING": ["k_proj", "v_proj", "down_proj"],
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING": ["down_proj"],
}


def tell_peft(model_type: str) -> None:
    """Add `model_type` to PEFT's tables of default targets, where PEFT has been imported.

    PEFT has no other way to learn them. Its import takes seconds, so it is not imported for this.
    """
    constants = sys.modules.get("peft.utils.constants")
    for name, targets in TARGETS.items():
        table = getattr(constants, name, None)
        if table is not None:
            table.setdefault(model_type, list(targets))


class Adaptable:
    """A model whose default targets PEFT knows once one has been made."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # ty: ignore[too-many-positional-arguments]  that of PreTrainedModel
        tell_peft(config.model_type)
