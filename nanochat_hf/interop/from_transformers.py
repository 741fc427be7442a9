"""transformers' own NanoChat, nanochat's architecture of October 2025, → ours: the same logits, and from then on all that ours can do."""

import torch
import torch.nn.functional as F
from transformers import AutoConfig, NanoChatForCausalLM

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


def config_from_transformers(theirs):
    """NanoChatConfig of transformers → NanochatConfig without windows and value embeddings. ValueError for what has no counterpart.

    transformers does not round cosines to bfloat16 in float32, as the original does; the imported model follows transformers.
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


def weights_from_transformers(weights, model):
    """Their state dict → that of `model` (ours), in float32: other names, lambdas that leave the stream as it is, padded tables."""
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


def model_from_transformers(folder, tokenizer_folder=None):
    """A folder of transformers' NanoChat → (NanochatForCausalLM, tokenizer). ValueError for another model or setting, or without a tokenizer.

    The tokenizer keeps its ids and gets our chat template, which also marks what the assistant says.
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
            f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}; give the one it was trained with"
        )
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|bos|>", "<|assistant_end|>", "<|output_end|>"
    tokenizer.add_bos_token, tokenizer.padding_side = True, "left"
    with torch.device("meta"):
        model = NanochatForCausalLM(config)
    weights = NanoChatForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    model.load_state_dict(weights_from_transformers(weights, model), assign=True)
    return model, tokenizer
