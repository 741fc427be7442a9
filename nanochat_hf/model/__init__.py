"""The GPT. These files ship to the Hub as remote code, so they lie in one folder and import only each other."""

from .configuration_nanochat_hf import NanochatConfig
from .modeling_nanochat_hf import (
    NanochatForCausalLM,
    NanochatForSequenceClassification,
    NanochatForTokenClassification,
    NanochatModel,
)

__all__ = [
    "NanochatConfig",
    "NanochatForCausalLM",
    "NanochatForSequenceClassification",
    "NanochatForTokenClassification",
    "NanochatModel",
]

# save_pretrained copies the code files only for classes that are registered
NanochatConfig.register_for_auto_class()
NanochatModel.register_for_auto_class("AutoModel")
NanochatForCausalLM.register_for_auto_class("AutoModelForCausalLM")
NanochatForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
NanochatForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
