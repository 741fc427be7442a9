"""From transformers' own NanoChat, nanochat's architecture of October 2025, to ours.

The imported model gives the same logits, and can do all that our models can.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoConfig, NanoChatForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from ..model import NanochatConfig, NanochatForCausalLM
from ..tokenizer import load_tokenizer

SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "final_logit_softcapping",
    "rope_parameters",
)
NEEDED = {"hidden_act": "relu2", "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False}
NAMES = {".mlp.fc1.": ".mlp.up_proj.", ".mlp.fc2.": ".mlp.down_proj."}


def config_from_transformers(theirs: PreTrainedConfig) -> NanochatConfig:
    """transformers' NanoChatConfig → NanochatConfig, without windows and value embeddings.

    In float32, nanochat rounds the cosines of RoPE to bfloat16 and transformers does not. The imported model follows
    transformers.

    Raises ValueError for a setting that our architecture lacks.
    """
    for name, needed in NEEDED.items():
        if getattr(theirs, name) != needed:
            raise ValueError(
                f"{name}={getattr(theirs, name)} is not in this architecture, which has {needed}; it cannot be imported"
            )
    return NanochatConfig(
        **{name: getattr(theirs, name) for name in SAME},
        head_dim=getattr(theirs, "head_dim", None),
        window_pattern="L",
        use_value_embeddings=False,
        rope_in_bfloat16=False,
    )


def weights_from_transformers(weights: dict[str, torch.Tensor], model: NanochatForCausalLM) -> dict[str, torch.Tensor]:
    """Their state dict → the state dict of `model`, which is ours, in float32.

    Tensors get our names and tables get our padding. The lambdas, which they lack, are 1 and 0: these change nothing.
    """
    named = {}
    for name, value in weights.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        named[name] = value.float()
    layers = model.config.num_hidden_layers
    named |= {"model.resid_lambdas": torch.ones(layers), "model.x0_lambdas": torch.zeros(layers)}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        named[name] = F.pad(named[name], (0, 0, 0, len(model.state_dict()[name]) - len(named[name])))
    return named


def model_from_transformers(
    folder: str | Path, tokenizer_folder: str | Path | None = None
) -> tuple[NanochatForCausalLM, PreTrainedTokenizerFast]:
    """A folder of transformers' NanoChat → our model and its tokenizer.

    The tokenizer keeps its ids. It gets our chat template, which also marks the tokens of the assistant.

    Raises ValueError for another model, for a setting that cannot be imported, and where there is no tokenizer.
    """
    try:
        theirs = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}/config.json: cannot be read ({str(error).splitlines()[0]})") from None
    if theirs.model_type == NanochatConfig.model_type:
        raise ValueError(f"{folder} is already one of ours: use it as it is")
    if theirs.model_type != "nanochat":
        raise ValueError(f"{folder} holds a model of type {theirs.model_type}; only nanochat can be imported")
    config = config_from_transformers(theirs)
    tokenizer = load_tokenizer(tokenizer_folder or folder)
    if len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}; "
            "give the one it was trained with"
        )
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|bos|>", "<|assistant_end|>", "<|output_end|>"
    tokenizer.add_bos_token, tokenizer.padding_side = True, "left"
    with torch.device("meta"):
        model = NanochatForCausalLM(config)
    weights = NanoChatForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    model.load_state_dict(weights_from_transformers(weights, model), assign=True)
    return model, tokenizer
