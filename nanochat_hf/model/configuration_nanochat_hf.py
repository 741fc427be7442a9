"""Configuration of the nanochat_hf architecture."""

import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

# `transformers serve` looks a model's class up by name in transformers itself (getattr(transformers, "NanochatForCausalLM"), 5.17 to 5.23),
# where the class of a saved folder is not, and its command line holds another copy of that module than `import transformers` gives: what
# all copies share is their type. The Auto class finds the folder's code.
if not hasattr(transformers, "NanochatForCausalLM"):
    type(transformers).NanochatForCausalLM = AutoModelForCausalLM


def _plain_rope(kwargs, theta):
    """Take rope_parameters (and its older name rope_scaling) out of `kwargs`; returns the base. ValueError for stretched positions."""
    for name in ("rope_parameters", "rope_scaling"):
        given = kwargs.pop(name, None) or {}
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{name} has rope_type={kind}, but only default is computed here: leave it out, or set rope_theta")
        theta = given.get("rope_theta", 10000.0) if theta is None else theta
    return theta


class NanochatConfig(PreTrainedConfig):
    """Sizes and windows of the model. `window_pattern` is tiled over the layers ("S": half the sequence, "L": all of it);
    the last layer always sees everything. `sliding_window` counts keys, the query's own among them. Tables have their rows rounded up
    to `pad_vocab_to_multiple_of`; resize_token_embeddings sets it to 1, since every row is a token then.

    The earlier architecture of 2025 is this one without value embeddings, windows ("L") and, as transformers' own NanoChat computes it,
    with `rms_norm_eps` 1e-6 (None: the dtype's own) and cosines that are not rounded to bfloat16.

    Raises ValueError for sizes that cannot be: the message names the value and the remedy.
    """

    model_type = "nanochat_hf"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self, vocab_size=32768, hidden_size=768, num_hidden_layers=12, num_attention_heads=6, num_key_value_heads=None,
        intermediate_size=None, head_dim=None, max_position_embeddings=2048, window_pattern="SSSL", layer_types=None,
        sliding_window=None, rope_theta=None, rope_in_bfloat16=True, rms_norm_eps=None, use_value_embeddings=True,
        pad_vocab_to_multiple_of=64, final_logit_softcapping=15.0, use_cache=True, **kwargs,
    ):  # fmt: skip
        if kwargs.get("model_type", self.model_type) != self.model_type:
            raise ValueError(f"model_type={kwargs['model_type']} is another model than {self.model_type}; scripts.import_nanochat takes nanochat")
        rope_theta = _plain_rope(kwargs, rope_theta)
        sizes = dict(
            vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads, intermediate_size=intermediate_size, head_dim=head_dim,
            max_position_embeddings=max_position_embeddings, rope_theta=rope_theta, rms_norm_eps=rms_norm_eps,
            pad_vocab_to_multiple_of=pad_vocab_to_multiple_of,
        )  # fmt: skip
        for name, size in sizes.items():
            if size is not None and size <= 0:
                raise ValueError(f"{name}={size} must be positive: give a size above 0")
        if not final_logit_softcapping or final_logit_softcapping <= 0:
            raise ValueError(f"final_logit_softcapping={final_logit_softcapping} must be positive: logits are always capped; try 15.0")
        if hidden_size % num_attention_heads and head_dim is None:
            raise ValueError(
                f"hidden_size={hidden_size} must be a multiple of num_attention_heads={num_attention_heads}; change one or give head_dim"
            )
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.max_position_embeddings, self.window_pattern = max_position_embeddings, str(window_pattern).upper()
        self.sliding_window = max_position_embeddings // 2 + 1 if sliding_window is None else sliding_window
        self.rope_theta, self.rope_in_bfloat16, self.rms_norm_eps = rope_theta, rope_in_bfloat16, rms_norm_eps
        self.use_value_embeddings, self.pad_vocab_to_multiple_of = use_value_embeddings, pad_vocab_to_multiple_of
        self.final_logit_softcapping, self.use_cache = final_logit_softcapping, use_cache
        self._check()
        if layer_types is None:
            kinds = {"S": "sliding_attention", "L": "full_attention"}
            tiled = [kinds[self.window_pattern[i % len(self.window_pattern)]] for i in range(num_hidden_layers)]
            layer_types = [*tiled[:-1], "full_attention"]
        self.layer_types = list(layer_types)
        if len(self.layer_types) != num_hidden_layers or set(self.layer_types) - {"sliding_attention", "full_attention"}:
            raise ValueError(
                f"layer_types={self.layer_types} must name sliding_attention or full_attention for each of num_hidden_layers={num_hidden_layers}"
            )
        if kwargs.pop("tie_word_embeddings", False):
            raise ValueError("tie_word_embeddings=True must be False: the head and the embedding are initialised and trained apart")
        kwargs.setdefault("auto_map", {
            "AutoConfig": "configuration_nanochat_hf.NanochatConfig",
            "AutoModel": "modeling_nanochat_hf.NanochatModel",
            "AutoModelForCausalLM": "modeling_nanochat_hf.NanochatForCausalLM",
        })  # fmt: skip
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)

    def _check(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads={self.num_key_value_heads} must divide num_attention_heads={self.num_attention_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE turns its halves against each other")
        if not self.window_pattern or set(self.window_pattern) - {"S", "L"}:
            raise ValueError(f"window_pattern={self.window_pattern!r} must be made of the letters S and L")
        if not 1 <= self.sliding_window <= self.max_position_embeddings:
            raise ValueError(
                f"sliding_window={self.sliding_window} must lie between 1 and max_position_embeddings={self.max_position_embeddings}"
            )
        if self.use_value_embeddings and self.hidden_size < 32:
            raise ValueError(f"hidden_size={self.hidden_size} must be at least 32: value gates read 32 channels")
