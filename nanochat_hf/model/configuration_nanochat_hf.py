"""Configuration of the nanochat_hf architecture."""

from typing import Any

from transformers import PreTrainedConfig

ROPE_THETA = 10000.0
# the short window, in positions before the query: half of the sequence, or a third or a quarter in blocks of 128
WINDOW_RULES = {"half": (2, 1), "third": (3, 128), "quarter": (4, 128)}
SMEAR_CHANNELS = 24  # of a token's embedding, which the gate of smear reads
LAYER_KINDS = {"S": "sliding_attention", "L": "full_attention"}
AUTO_MAP = {
    "AutoConfig": "configuration_nanochat_hf.NanochatConfig",
    "AutoModel": "modeling_nanochat_hf.NanochatModel",
    "AutoModelForCausalLM": "modeling_nanochat_hf.NanochatForCausalLM",
    "AutoModelForSequenceClassification": "modeling_nanochat_hf.NanochatForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_nanochat_hf.NanochatForTokenClassification",
}


def _plain_rope(kwargs: dict, theta: float | None) -> float:
    """Take rope_parameters (and its older name rope_scaling) out of `kwargs` and return the base of RoPE.

    Raises ValueError for a rope_type that scales positions: the model does not compute those.
    """
    for name in ("rope_parameters", "rope_scaling"):
        given = kwargs.pop(name, None) or {}
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default":
            raise ValueError(
                f"{name} has rope_type={kind}, but only default is computed here: leave it out, or set rope_theta"
            )
        theta = given.get("rope_theta", ROPE_THETA) if theta is None else theta
    return ROPE_THETA if theta is None else theta


def short_window(positions: int, rule: str) -> int:
    """Keys that a query of a windowed layer sees, its own included, in a model for so many positions.

    >>> [short_window(2048, rule) for rule in ("half", "third", "quarter")], short_window(64, "third")
    ([1025, 769, 513], 64)
    """
    parts, block = WINDOW_RULES[rule]
    before = positions // 2 if rule == "half" else block * -(-positions // (parts * block))
    return min(before + 1, positions)  # blocks may be longer than a short sequence


def _check_positive(sizes: dict[str, Any], cap: float) -> None:
    # sizes that are None are derived later, from the others
    for name, value in sizes.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value} must be positive: give a size above 0")
    if not cap or cap <= 0:
        raise ValueError(f"final_logit_softcapping={cap} must be positive: logits are always capped; try 15.0")


class NanochatConfig(PreTrainedConfig):
    """Sizes and windows of the model, and which parts it has. The defaults are nanochat's of February 2026.

    `window_pattern` repeats over the layers: "S" sees a part of the sequence, "L" all of it. The last layer always sees
    all of it. `window_rule` says how long the part is (`short_window`); `sliding_window` sets it as a number of keys,
    the query's own included.

    `value_gate_channels`, `value_gate_scale`: the gate of the value embeddings is value_gate_scale·sigmoid of a linear
    map of that many channels of a layer's input. `qk_scale`: factor on queries and on keys after their norm. `smear`:
    a gated share of the embedding of the token before joins each token's embedding. `backout`: a learnt multiple of the
    stream after the middle layer is taken away before the last norm.

    How training starts: `embedding_std`, the deviation of the token embedding; `mlp_init_scale`, a factor on the MLP's
    first matrix; `value_gate_init`, gates begin uniform between 0 and this; the residual scalars of the first and of
    the last layer (`resid_lambda_first`, …), with a straight line between.

    `pad_vocab_to_multiple_of`: the rows of the tables are rounded up to a multiple of it, because matrix kernels are
    faster then. Rows beyond `vocab_size` belong to no token and change no result. Training pads to 64. A published
    folder has 1, so exactly `vocab_size` rows, and so has a model after resize_token_embeddings.

    nanochat's architecture of 2025 is this one without value embeddings and without windows ("L"). transformers' own
    NanoChat computes that one too, but with `rms_norm_eps` 1e-6 (None here: the dtype's own epsilon) and without
    rounding the cosines to bfloat16.

    Raises ValueError for impossible sizes; the message names the value and the remedy.
    """

    model_type = "nanochat_hf"
    keys_to_ignore_at_inference = ["past_key_values"]
    # Tensor parallelism splits the MLP alone. Splitting attention by heads would need the value embeddings split as
    # well.
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
        window_rule: str = "half",
        rope_theta: float | None = None,
        rope_in_bfloat16: bool = True,
        rms_norm_eps: float | None = None,
        qk_scale: float = 1.0,
        use_value_embeddings: bool = True,
        value_gate_channels: int = 32,
        value_gate_scale: float = 2.0,
        smear: bool = False,
        backout: bool = False,
        pad_vocab_to_multiple_of: int = 64,
        final_logit_softcapping: float = 15.0,
        embedding_std: float = 1.0,
        mlp_init_scale: float = 1.0,
        value_gate_init: float = 0.0,
        resid_lambda_first: float = 1.0,
        resid_lambda_last: float = 1.0,
        x0_lambda_first: float = 0.1,
        x0_lambda_last: float = 0.1,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        if kwargs.get("model_type", self.model_type) != self.model_type:
            raise ValueError(
                f"model_type={kwargs['model_type']} is another model than {self.model_type}; "
                "scripts.import_nanochat takes nanochat"
            )
        rope_theta = _plain_rope(kwargs, rope_theta)
        sizes = dict(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            intermediate_size=intermediate_size,
            head_dim=head_dim,
            max_position_embeddings=max_position_embeddings,
            rope_theta=rope_theta,
            rms_norm_eps=rms_norm_eps,
            qk_scale=qk_scale,
            value_gate_channels=value_gate_channels,
            value_gate_scale=value_gate_scale,
            embedding_std=embedding_std,
            mlp_init_scale=mlp_init_scale,
            pad_vocab_to_multiple_of=pad_vocab_to_multiple_of,
        )
        _check_positive(sizes, final_logit_softcapping)
        if head_dim is None and hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size={hidden_size} must be a multiple of num_attention_heads={num_attention_heads}; "
                "change one or give head_dim"
            )
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.max_position_embeddings = num_attention_heads, max_position_embeddings
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        if window_rule not in WINDOW_RULES:
            raise ValueError(f"window_rule={window_rule} is unknown; choose from {', '.join(WINDOW_RULES)}")
        self.window_rule, self.window_pattern = window_rule, str(window_pattern).upper()
        derived = short_window(max_position_embeddings, window_rule)
        self.sliding_window = derived if sliding_window is None else sliding_window
        self.layer_types = self._tiled_pattern(layer_types)
        self.rope_theta, self.rope_in_bfloat16 = rope_theta, rope_in_bfloat16
        self.rms_norm_eps, self.qk_scale = rms_norm_eps, qk_scale
        self.use_value_embeddings, self.value_gate_channels = use_value_embeddings, value_gate_channels
        self.value_gate_scale, self.smear, self.backout = value_gate_scale, smear, backout
        self.embedding_std, self.mlp_init_scale, self.value_gate_init = embedding_std, mlp_init_scale, value_gate_init
        self.resid_lambda_first, self.resid_lambda_last = resid_lambda_first, resid_lambda_last
        self.x0_lambda_first, self.x0_lambda_last = x0_lambda_first, x0_lambda_last
        self.pad_vocab_to_multiple_of, self.final_logit_softcapping = pad_vocab_to_multiple_of, final_logit_softcapping
        self.use_cache = use_cache
        self._check()
        if kwargs.pop("tie_word_embeddings", False):
            raise ValueError(
                "tie_word_embeddings=True must be False: the head and the embedding are initialised and trained apart"
            )
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        # transformers accepts any keyword here by a decorator that ty does not see through
        super().__init__(**kwargs, tie_word_embeddings=False)  # ty: ignore[unknown-argument]

    def _tiled_pattern(self, given: list[str] | None) -> list[str]:
        # the kind of each layer: as given, else the pattern tiled over the layers
        pattern, layers = self.window_pattern, self.num_hidden_layers
        if not pattern or set(pattern) - set(LAYER_KINDS):
            raise ValueError(f"window_pattern={pattern!r} must be made of the letters S and L")
        if given is not None:
            return list(given)
        tiled = [LAYER_KINDS[pattern[i % len(pattern)]] for i in range(layers)]
        return [*tiled[:-1], "full_attention"]

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
        readers = {"value gates": self.value_gate_channels if self.use_value_embeddings else 0}
        for reader, channels in (readers | {"the gate of smear": SMEAR_CHANNELS if self.smear else 0}).items():
            if self.hidden_size < channels:
                raise ValueError(
                    f"hidden_size={self.hidden_size} must be at least {channels}: {channels} channels go into {reader}"
                )
        if self.value_gate_init < 0:
            raise ValueError(f"value_gate_init={self.value_gate_init} must be at least 0; 0 begins with zeros")
