"""nanochat's recipe as a Hugging Face Accelerate trainer.

Importing the package registers its model with transformers' Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .__about__ import __version__
from .model import (
    NanochatConfig,
    NanochatForCausalLM,
    NanochatForSequenceClassification,
    NanochatForTokenClassification,
    NanochatModel,
)

__all__ = ["NanochatConfig", "NanochatForCausalLM", "NanochatModel", "__version__"]

AutoConfig.register(NanochatConfig.model_type, NanochatConfig, exist_ok=True)
AutoModel.register(NanochatConfig, NanochatModel, exist_ok=True)
AutoModelForCausalLM.register(NanochatConfig, NanochatForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(NanochatConfig, NanochatForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(NanochatConfig, NanochatForTokenClassification, exist_ok=True)
