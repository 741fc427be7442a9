"""nanochat's recipe as a Hugging Face Accelerate trainer. Importing the package registers its model with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .model import NanochatConfig, NanochatForCausalLM, NanochatModel

__version__ = "0.1.0"
__all__ = ["NanochatConfig", "NanochatForCausalLM", "NanochatModel"]

AutoConfig.register(NanochatConfig.model_type, NanochatConfig, exist_ok=True)
AutoModel.register(NanochatConfig, NanochatModel, exist_ok=True)
AutoModelForCausalLM.register(NanochatConfig, NanochatForCausalLM, exist_ok=True)
