"""Configuration of the nanochat_hf architecture."""

from transformers import PreTrainedConfig

GATE_CHANNELS = 32  # channels of a layer's input that the gate of its value embeddings reads
LAYER_KINDS = {"S": "sliding_attention", "L": "full_attention"}
AUTO_MAP = {
    "AutoConfig": "configuration_nanochat_hf.NanochatConfig",
    "AutoModel": "modeling_nanochat_hf.NanochatModel",
    "AutoModelForCausalLM": "modeling_nanochat_hf.NanochatForCausalLM",
}


def _plain_rope(kwargs: dict, theta: float | None) -> float:
    """Take rope_parameters (and its older name rope_scaling) out of `kwargs`; returns the base of RoPE.

    Raises ValueError for stretched positions, which are not computed here.
    """
    for name in ("rope_parameters", "rope_scaling"):
        given = kwargs.pop(name, None) or {}
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default":
            raise ValueError(
                f"{name} has rope_type={kind}, but only default is computed here: leave it out, or set rope_theta"
            )
        theta = given.get("rope_theta", 10000.0) if theta is None else theta
    return theta


class NanochatConfig(PreTrainedConfig):
    """Sizes and windows of the model.

    `window_pattern` is tiled over the layers: "S" sees half the sequence, "L" all of it, and the last layer always all of it.
    `sliding_window` counts keys, the query's own among them.

    `pad_vocab_to_multiple_of`: the tables have their rows rounded up to it, because matrix kernels are faster then. Rows beyond
    `vocab_size` are no tokens and change no result. Training pads to 64; a folder to publish has 1, exactly `vocab_size` rows,
    and so has a model after resize_token_embeddings.

    The earlier architecture of 2025 is this one without value embeddings and windows ("L"). transformers' own NanoChat also
    computes it with `rms_norm_eps` 1e-6 (None: the dtype's own) and with cosines that are not rounded to bfloat16.

    Raises ValueError for sizes that cannot be; the message names the value and the remedy.
    """

    model_type = "nanochat_hf"
    keys_to_ignore_at_inference = ["past_key_values"]
    # The value embeddings are whole on each device, where heads are split: so attention is not, and the MLP alone is.
    base_model_tp_plan = {"layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}

    def __init__(
        self,
        vocab_size: int = 32768,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 6,
        num_key_value_heads: int | None = None,
        intermediate_size: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 2048,
        window_pattern: str = "SSSL",
        layer_types: list[str] | None = None,
        sliding_window: int | None = None,
        rope_theta: float | None = None,
        rope_in_bfloat16: bool = True,
        rms_norm_eps: float | None = None,
        use_value_embeddings: bool = True,
        pad_vocab_to_multiple_of: int = 64,
        final_logit_softcapping: float = 15.0,
        use_cache: bool = True,
        **kwargs,
    ):
        if kwargs.get("model_type", self.model_type) != self.model_type:
            raise ValueError(
                f"model_type={kwargs['model_type']} is another model than {self.model_type}; scripts.import_nanochat takes nanochat"
            )
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.intermediate_size, self.head_dim = intermediate_size, head_dim
        self.max_position_embeddings, self.sliding_window = max_position_embeddings, sliding_window
        self.window_pattern, self.layer_types = str(window_pattern).upper(), layer_types
        self.rope_theta, self.rope_in_bfloat16 = _plain_rope(kwargs, rope_theta), rope_in_bfloat16
        self.rms_norm_eps, self.use_value_embeddings = rms_norm_eps, use_value_embeddings
        self.pad_vocab_to_multiple_of, self.final_logit_softcapping = pad_vocab_to_multiple_of, final_logit_softcapping
        self.use_cache = use_cache
        self._check_positive()
        self._fill_in()
        self._check()
        if kwargs.pop("tie_word_embeddings", False):
            raise ValueError(
                "tie_word_embeddings=True must be False: the head and the embedding are initialised and trained apart"
            )
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__init__(**kwargs, tie_word_embeddings=False)

    def _check_positive(self):
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        names += ("intermediate_size", "head_dim", "max_position_embeddings", "rope_theta", "rms_norm_eps")
        for name in (*names, "pad_vocab_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be positive: give a size above 0")
        cap = self.final_logit_softcapping
        if not cap or cap <= 0:
            raise ValueError(f"final_logit_softcapping={cap} must be positive: logits are always capped; try 15.0")

    def _fill_in(self):
        # what was not given, from what was
        if self.hidden_size % self.num_attention_heads and self.head_dim is None:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}; "
                "change one or give head_dim"
            )
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.sliding_window is None:
            self.sliding_window = self.max_position_embeddings // 2 + 1
        pattern, layers = self.window_pattern, self.num_hidden_layers
        if not pattern or set(pattern) - set(LAYER_KINDS):
            raise ValueError(f"window_pattern={pattern!r} must be made of the letters S and L")
        if self.layer_types is None:
            tiled = [LAYER_KINDS[pattern[i % len(pattern)]] for i in range(layers)]
            self.layer_types = [*tiled[:-1], "full_attention"]
        self.layer_types = list(self.layer_types)

    def _check(self):
        heads, layers = self.num_attention_heads, self.num_hidden_layers
        if len(self.layer_types) != layers or set(self.layer_types) - set(LAYER_KINDS.values()):
            raise ValueError(
                f"layer_types={self.layer_types} must name sliding_attention or full_attention for each of "
                f"num_hidden_layers={layers}"
            )
        if heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads={self.num_key_value_heads} must divide num_attention_heads={heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE turns its halves against each other")
        if not 1 <= self.sliding_window <= self.max_position_embeddings:
            raise ValueError(
                f"sliding_window={self.sliding_window} must lie between 1 and "
                f"max_position_embeddings={self.max_position_embeddings}"
            )
        if self.use_value_embeddings and self.hidden_size < GATE_CHANNELS:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be at least {GATE_CHANNELS}: value gates read {GATE_CHANNELS} channels"
            )
