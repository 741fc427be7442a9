"""The GPT. Flat and importing only itself, for it ships to the Hub as remote code."""

from .configuration_nanochat_hf import NanochatConfig
from .modeling_nanochat_hf import NanochatForCausalLM, NanochatModel

__all__ = ["NanochatConfig", "NanochatForCausalLM", "NanochatModel"]
