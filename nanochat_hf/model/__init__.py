"""The GPT. Flat and importing only itself, for it ships to the Hub as remote code."""

from .configuration_nanochat_hf import NanochatConfig
from .modeling_nanochat_hf import NanochatForCausalLM, NanochatModel

__all__ = ["NanochatConfig", "NanochatForCausalLM", "NanochatModel"]

# saving copies the code files beside the weights only for classes that are marked so
NanochatConfig.register_for_auto_class()
NanochatModel.register_for_auto_class("AutoModel")
NanochatForCausalLM.register_for_auto_class("AutoModelForCausalLM")
