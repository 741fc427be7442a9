"""nanochat's GPT as a PreTrainedModel. It computes through a table of operations, see ops_nanochat_hf.py.

Letters: B rows, T positions, C hidden_size, H query heads, K key/value heads, D head_dim, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, modeling_layers
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .adapters_nanochat_hf import Adaptable
from .configuration_nanochat_hf import NanochatConfig
from .layers_nanochat_hf import NanochatMLP, eager_attention_forward, has_value_embedding, initialise, linear
from .loss_nanochat_hf import LossSizes, SoftcappedLoss, chunked_loss
from .masks_nanochat_hf import DocumentBorders, masks_and_documents
from .ops_nanochat_hf import PLAIN, Attend, Heads, Ops, ValueEmbedding, are_plain, norm
from .policy_nanochat_hf import Policy, PolicyOutput, PolicyTokens, policy_loss
from .resizing_nanochat_hf import ResizableTables, table_rows
from .smear_nanochat_hf import Smear, follows, remember, token_before

LOSS_CHUNK = 8192  # tokens whose logits exist at one time: 512 MiB in bfloat16 at V = 32768


class NanochatAttention(nn.Module):
    """Causal attention with RoPE, then QK norm; value embeddings join through a gate per key/value head."""

    def __init__(self, config: NanochatConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        C, D, H, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        # qk_scale is on queries and on keys, so squared on their products
        self.num_key_value_groups, self.scaling, self.is_causal = H // K, config.qk_scale**2 * D**-0.5, True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        self.q_proj = linear(C, H * D)
        self.k_proj = linear(C, K * D)
        self.v_proj = linear(C, K * D)
        self.o_proj = linear(H * D, C, "zero")
        gated = has_value_embedding(config, layer_idx)
        self.ve_gate = linear(config.value_gate_channels, K, "value gate") if gated else None

    def forward(
        self,
        stream: Tensor,
        x: Tensor,
        first: Tensor,
        table: nn.Module | None,
        input_ids: Tensor | None,
        rope: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        ops: Ops,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The stream (B, T, C) plus the output of attention, and attention weights or None.

        x (B, T, C) is the stream's norm. `first` are that norm's first channels, which the gate of the value embeddings
        reads.
        """
        # vLLM looks for the call of the interface in the source of this method, so it stands here
        implementation = self.config._attn_implementation
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)

        def call(q, k, v):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D), (B, K, T, D)
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, self.layer_idx)
            options = dict(dropout=0.0, sliding_window=self.sliding_window, **kwargs)
            k, v = k.to(q.dtype), v.to(q.dtype)
            return attention_interface(self, q, k, v, attention_mask, scaling=self.scaling, **options)

        whole_rows = attention_mask is None and past_key_values is None
        borders = kwargs.get("cu_seq_lens_q")
        attend = Attend(call, implementation, whole_rows, self.scaling, self.sliding_window, borders)
        value = None
        if self.ve_gate is not None:
            gate = self.config.value_gate_scale * torch.sigmoid(self.ve_gate(first))  # (B, T, K); with a table and ids
            value = ValueEmbedding(gate.to(first.dtype), table, input_ids)  # ty: ignore[invalid-argument-type]
        heads = Heads(self.q_proj, self.k_proj, self.v_proj, self.head_dim, self.config.rms_norm_eps)
        y, weights = ops.attention(ops, x, heads, value, rope, attend)
        return ops.project_and_add(y.reshape(*x.shape[:-1], -1), self.o_proj, stream), weights


class NanochatDecoderLayer(modeling_layers.GradientCheckpointingLayer):
    """x ← r·x + s·x0, then x ← x + attn(norm(x)), then the update mlp(norm(x)), which the next layer adds."""

    def __init__(self, config: NanochatConfig, layer_idx: int):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.channels = config.value_gate_channels if has_value_embedding(config, layer_idx) else 0
        self.self_attn = NanochatAttention(config, layer_idx)
        self.mlp = NanochatMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        update: Tensor,
        x0: Tensor,
        lambdas: Tensor,
        rope: Tensor,
        input_ids: Tensor | None = None,
        table: nn.Module | None = None,
        *,
        ops: Ops = PLAIN,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Stream, the previous layer's update and x0 (B, T, C), lambdas (r, s) → the same three for the next layer."""
        # the scalars stay float32: a step changes them by less than bfloat16 can tell apart
        x, normed, first, x0 = ops.mix_and_norm(hidden_states, update, x0, lambdas, self.eps, self.channels)
        x, _ = self.self_attn(x, normed, first, table, input_ids, rope, ops=ops, **kwargs)
        x, normed = ops.stream_and_norm(x, self.eps)
        return x, self.mlp(normed, ops), x0


class NanochatPreTrainedModel(Adaptable, ResizableTables, PreTrainedModel):
    """What both models share: flags for transformers, and the initialisation."""

    config_class = NanochatConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanochatDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["resid_lambdas", "x0_lambdas", "backout_lambda", "strength"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"attentions": NanochatAttention}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights. transformers would take that of the first parameters, the float32 scalars."""
        embeddings: Any = self.get_input_embeddings()
        return embeddings.weight.dtype

    @torch.no_grad()
    def _init_weights(self, module):
        initialise(module, self.config)  # transformers calls this for each module that owns parameters


class NanochatModel(DocumentBorders, NanochatPreTrainedModel):
    """Ids (B, T) → normed hidden states (B, T, C)."""

    def __init__(self, config: NanochatConfig):
        super().__init__(config)
        rows, width = table_rows(config), config.num_key_value_heads * config.head_dim
        layers = range(config.num_hidden_layers)
        self.embed_tokens = nn.Embedding(rows, config.hidden_size)
        self.embed_tokens.init_scheme = "embedding"  # ty: ignore[invalid-assignment]  as in `linear`
        tables = {str(i): nn.Embedding(rows, width) for i in layers if has_value_embedding(config, i)}
        self.value_embeds = nn.ModuleDict(tables)
        self.layers = nn.ModuleList(NanochatDecoderLayer(config, i) for i in layers)
        self.resid_lambdas = nn.Parameter(torch.ones(config.num_hidden_layers))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.num_hidden_layers))
        self.smear = Smear() if config.smear else None
        self.backout_lambda = nn.Parameter(torch.zeros(1)) if config.backout else None
        self.gradient_checkpointing = False
        self.training_ops = PLAIN
        self.post_init()

    @property
    def ops(self) -> Ops:
        """The table in use: in training the one that a trainer has set, else the plain formulas."""
        return self.training_ops if self.training else PLAIN

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        previous_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Ids (B, T) → normed hidden states (B, T, C).

        `position_ids` (B, T) that start again within a row keep the documents of that row apart, as long as neither
        mask nor cache is given. `hidden_states` of the result: the stream before each layer, then the input of the
        head. `previous_ids` (B, 1), the tokens before these, is for smear with a cache that does not remember them.
        """
        if input_ids is None and (inputs_embeds is None or self.config.use_value_embeddings or self.config.smear):
            looked_up = "value embeddings are" if self.config.use_value_embeddings else "the token before is"
            raise ValueError(f"inputs_embeds cannot replace input_ids: {looked_up} looked up by id; give input_ids")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        ops, config, eps = self.ops, self.config, self.config.rms_norm_eps
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            # the residual stream too is in low precision, as in nanochat, whose embedding is bfloat16: half the bytes
            x = x.to(torch.get_autocast_dtype(x.device.type))
        given = "cu_seq_lens_q" in kwargs
        masks, documents = masks_and_documents(self.config, x, attention_mask, position_ids, past_key_values, given)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(x.shape[1], device=x.device) + past).unsqueeze(0)
        if use_cache and past_key_values is None:
            # after the masks, because those keep documents apart only where no cache is given
            past_key_values = DynamicCache(config=self.config)
        rope = ops.rope_tables(position_ids, config.head_dim, float(config.rope_theta), config.rope_in_bfloat16)
        x = norm(x, eps)
        if self.smear is not None:
            last = token_before(config, past_key_values, "cache" in kwargs) if previous_ids is None else previous_ids
            last = None if last is None else norm(self.embed_tokens(last).to(x.dtype), eps)
            borders = kwargs.get("cu_seq_lens_q") if past_key_values is None else None
            x = self.smear(x, last, follows(position_ids, attention_mask, len(x), borders))
        x0, middle, hidden = x, None, []
        update = nothing = torch.zeros_like(x)
        # transformers shortens num_hidden_layers for a draft by the first layers (assistant_early_exit)
        for i, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            if self.gradient_checkpointing or output_hidden_states:
                x, update = x + update, nothing  # checkpointing then keeps one tensor a layer, the one in hidden_states
                hidden.append(x)
            # Each layer stacks its own two scalars: gradients that are views would cost XLA one more program. The cache
            # is a keyword because checkpointing removes it by name; or else recomputing would write to it twice.
            x, update, x0 = layer(
                x,
                update,
                x0,
                torch.stack((self.resid_lambdas[i], self.x0_lambdas[i])),
                rope,
                input_ids,
                self.value_embeds[str(i)] if str(i) in self.value_embeds else None,  # noqa: SIM401  no .get there
                attention_mask=masks[self.config.layer_types[i]],
                past_key_values=past_key_values,
                ops=ops,
                **documents | kwargs,
            )
            if i == len(self.layers) // 2 and self.backout_lambda is not None:
                middle = x + update
        x = x + update
        if middle is not None:
            x = x - self.backout_lambda[0] * middle  # ty: ignore[not-subscriptable]  there is one where a middle is
        if self.smear is not None and previous_ids is None and past_key_values is not None:
            remember(past_key_values, input_ids)  # ty: ignore[invalid-argument-type]  without ids it raised above
        x = norm(x, eps)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*hidden, x) if output_hidden_states else None,
        )


class NanochatForCausalLM(NanochatPreTrainedModel, GenerationMixin):
    """The language model: head and soft-cap on NanochatModel, and the loss."""

    def __init__(self, config: NanochatConfig):
        super().__init__(config)
        self.model = NanochatModel(config)
        self.lm_head = linear(config.hidden_size, table_rows(config), "head")
        self.policy = Policy()  # of reinforcement learning, which a trainer may set
        self.post_init()

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (…, C) → float32 logits (…, V), cut to the vocabulary and soft-capped."""
        cap = self.config.final_logit_softcapping
        return cap * torch.tanh(self.lm_head(hidden)[..., : self.config.vocab_size].float() / cap)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Ids (B, T) → logits (B, T, V) and loss = Σ nll·weight ÷ num_items_in_batch (default: the valid targets).

        `labels` (B, T) are unshifted; `shift_labels` (B, T) hold the target of each position; −100 is ignored.
        `skip_logits` returns None for the logits. Training with targets does so by default, since float32 logits would
        be its largest tensor. A batch with `answer_ids` is one of reinforcement learning (see policy_nanochat_hf.py):
        its loss is that of `self.policy`, and the output has log-probabilities and entropies.
        """
        # no named argument: Trainer takes each one with "label" in its name for a column that evaluation needs
        shift_labels, tokens = kwargs.pop("shift_labels", None), PolicyTokens.taken(kwargs, loss_weights)
        inputs = input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache
        output = self.model(*inputs, return_dict=True, **kwargs)
        hidden = output.last_hidden_state
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
        loss, logits, scores = None, None, {}
        if shift_labels is not None:
            # without a single valid target the loss is 0, not NaN
            valid = (shift_labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            total, scores = self._loss(hidden, shift_labels, loss_weights, tokens)
            loss = total / valid
        if skip_logits is None:
            skip_logits = self.training and shift_labels is not None
        if not skip_logits:
            last = isinstance(logits_to_keep, int) and logits_to_keep
            keep = slice(-logits_to_keep, None) if last else logits_to_keep
            logits = self.logits(hidden if isinstance(keep, int) else hidden[:, keep])
        return (PolicyOutput if scores else CausalLMOutputWithPast)(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            **scores,
        )

    def _loss(self, hidden, targets, weights, tokens):
        # (sum over the targets, what the output holds beside it)
        sizes = LossSizes(self.config.vocab_size, self.config.final_logit_softcapping, LOSS_CHUNK)
        if tokens is not None:
            total, log_probs, entropies = policy_loss(self, hidden, targets, tokens, sizes)
            return total, {"log_probs": log_probs, "entropies": entropies}
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights.flatten().float()
        if self.training and torch.is_grad_enabled() and are_plain(self.lm_head):
            return SoftcappedLoss.apply(hidden, self.lm_head.weight, targets, weights, sizes, self.model.ops), {}
        return chunked_loss(self.logits, hidden, targets, weights, LOSS_CHUNK, recompute=self.training), {}


class NanochatForSequenceClassification(modeling_layers.GenericForSequenceClassification, NanochatPreTrainedModel):
    """A score of each of `num_labels` for a whole text, from its last token: reward models and classifiers."""

    def __init__(self, config: NanochatConfig):
        NanochatPreTrainedModel.__init__(self, config)  # not the generic one, which would look for the folder's code
        self.num_labels, self.model = config.num_labels or 1, NanochatModel(config)
        self.score = linear(config.hidden_size, self.num_labels, "head")
        self.post_init()


class NanochatForTokenClassification(modeling_layers.GenericForTokenClassification, NanochatPreTrainedModel):
    """A score of each of `num_labels` for every token."""

    def __init__(self, config: NanochatConfig):
        NanochatPreTrainedModel.__init__(self, config)
        self.num_labels, self.model = config.num_labels or 1, NanochatModel(config)
        self.dropout = nn.Identity()
        self.score = linear(config.hidden_size, self.num_labels, "head")
        self.post_init()
