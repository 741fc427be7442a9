"""From ours to transformers' own NanoChat, where a model has none of the parts that came after October 2025.

The exported folder needs no remote code, so programs that know that class load it.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, NanoChatConfig, NanoChatForCausalLM, PreTrainedTokenizerBase

from nanochat_hf.machine.durable import whole_folder

from ..model import NanochatConfig, NanochatForCausalLM
from ..tokenizer import load_tokenizer
from .folder import without_padding
from .from_transformers import NAMES, SAME


def later_parts(model: NanochatForCausalLM) -> list[str]:
    """What the model has that transformers' NanoChat lacks, in a few words each."""
    config, base = model.config, model.model
    found = {
        "value embeddings": config.use_value_embeddings,
        f"windows of {config.sliding_window} keys": "sliding_attention" in config.layer_types,
        "smear": config.smear,
        "backout": config.backout,
        f"qk_scale {config.qk_scale:g}": config.qk_scale != 1.0,
        "residual scalars other than 1": bool((base.resid_lambdas != 1).any()),
        "scalars of the embedding other than 0": bool((base.x0_lambdas != 0).any()),
    }
    return [name for name, there in found.items() if there]


def config_to_transformers(config: NanochatConfig, tokenizer: PreTrainedTokenizerBase) -> NanoChatConfig:
    """The sizes as transformers' NanoChatConfig. Its epsilon of norms is ours in float32, in which norms compute."""
    settings = {name: getattr(config, name) for name in SAME if name not in ("rms_norm_eps", "rope_parameters")}
    eps = torch.finfo(torch.float32).eps if config.rms_norm_eps is None else config.rms_norm_eps
    own_width = config.head_dim * config.num_attention_heads != config.hidden_size
    return NanoChatConfig(
        **settings,
        **({"head_dim": config.head_dim} if own_width else {}),
        rms_norm_eps=eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def export_to_transformers(folder: str | Path, output: str | Path, say: Callable[[str], None] = print) -> Path:
    """Write the model folder `folder` as one of transformers' NanoChat, in the dtype of its weights; returns `output`.

    `say` gets one line where float32 logits are not quite the same.

    Raises ValueError, with the parts, for a model that transformers' class cannot compute, and where `output` exists.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"--output {output} exists already; name a new folder")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != NanochatConfig.model_type:
        raise ValueError(f"{folder} holds a model of type {config.model_type}, not {NanochatConfig.model_type}")
    model = NanochatForCausalLM.from_pretrained(folder)
    parts = later_parts(model)
    if parts:
        raise ValueError(
            f"{folder} has {', '.join(parts)}, which transformers' NanoChat lacks; "
            "load it with trust_remote_code=True, or export it for nanochat by scripts.export_nanochat"
        )
    weights = without_padding(model.state_dict(), config.vocab_size)
    named = {}
    for name, value in weights.items():
        for theirs, ours in NAMES.items():
            name = name.replace(ours, theirs)
        named[name] = value
    for scalars in ("model.resid_lambdas", "model.x0_lambdas"):
        del named[scalars]
    tokenizer = load_tokenizer(folder)
    with torch.device("meta"):
        made = NanoChatForCausalLM(config_to_transformers(config, tokenizer))
    made.load_state_dict(named, assign=True)
    made.generation_config = model.generation_config
    with whole_folder(output) as partial:
        made.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    if config.rope_in_bfloat16:
        say(
            "cosines are rounded to bfloat16 here and exact in transformers' NanoChat: the same in bfloat16, "
            "in float32 logits differ in the third place"
        )
    return output
