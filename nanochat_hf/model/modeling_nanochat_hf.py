"""nanochat's GPT as a PreTrainedModel.

Letters: B rows, T positions, C hidden_size, H query heads, K key/value heads, D head_dim, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_nanochat_hf import NanochatConfig

GATE_CHANNELS = 32
LOSS_CHUNK = 8192  # tokens whose logits exist at one time: 512 MiB in bfloat16 at V = 32768


def norm(x):
    """RMS norm over the last axis, without a weight, with the dtype's own epsilon; autocast may not widen the stream."""
    return F.rms_norm(x, (x.shape[-1],)).to(x.dtype)


def rotate(x, cos, sin):
    """Rotate the halves of x (B, T, H, D) by −θ, the reference's direction."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def eager_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Plain attention; shapes as in transformers: query (B, H, T, D) → (B, T, H, D), weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _rope(position_ids: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim)
    angle = position_ids[:, :, None, None].float() * frequency
    # rounded to bfloat16 as the reference's tables are, with which its checkpoints were trained
    return torch.stack((angle.cos(), angle.sin())).bfloat16()  # float16 autocast refuses to stack bfloat16


# An operator of its own, since torch.compile would otherwise compute cos and sin anew inside each kernel of each layer that reads them.
# Registered once, though Hub and package may both bring this file.
if not hasattr(torch.ops.nanochat_hf, "rope"):
    torch.library.custom_op("nanochat_hf::rope", _rope, mutates_args=())
    torch.library.register_fake(
        "nanochat_hf::rope", lambda ids, head_dim, theta: ids.new_empty((2, *ids.shape, 1, head_dim // 2), dtype=torch.bfloat16)
    )


class NanochatAttention(nn.Module):
    """Causal attention with RoPE, then QK norm; value embeddings join through a gate per key/value head."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        C, D, H, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups, self.scaling, self.is_causal = H // K, D**-0.5, True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        self.q_proj = linear(C, H * D)
        self.k_proj = linear(C, K * D)
        self.v_proj = linear(C, K * D)
        self.o_proj = linear(H * D, C, "zero")
        self.ve_gate = linear(GATE_CHANNELS, K, "zero") if has_value_embedding(config, layer_idx) else None
        self.fused = None  # in training, a kernel in place of `queries_and_keys` may stand here

    def queries_and_keys(self, x, rope):
        """Rotated and normed q (B, T, H, D) and k (B, T, K, D)."""
        q, k = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj))
        cos, sin = (t.to(q.dtype) for t in rope)
        # norm after RoPE, so that attention logits stay bounded (arXiv:2302.05442)
        return norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))

    def forward(self, x, value_embedding, rope, attention_mask, past_key_values, **kwargs):
        B, T, _ = x.shape
        q, k = self.fused(self, x, rope) if self.fused and self.training else self.queries_and_keys(x, rope)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        if self.ve_gate is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))  # (B, T, K)
            v = v + gate.unsqueeze(-1).to(v.dtype) * value_embedding.view_as(v).to(v.dtype)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D), (B, K, T, D); views, after all that reads memory in order
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        y, weights = attend(
            self, q, k.to(q.dtype), v.to(q.dtype), attention_mask, dropout=0.0, scaling=self.scaling,
            sliding_window=self.sliding_window, **kwargs,
        )  # fmt: skip
        return self.o_proj(y.reshape(B, T, -1)), weights


class NanochatMLP(nn.Module):
    """C → 4C → C with relu(·)²."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size, "zero")
        self.fused = None  # in training, a kernel for both products may stand here

    def forward(self, x):
        if self.fused and self.training:
            return self.fused(x, self.up_proj.weight, self.down_proj.weight)
        return self.down_proj(F.relu(self.up_proj(x)).square())


class NanochatDecoderLayer(GradientCheckpointingLayer):
    """x ← x + attn(norm(x)), then x ← x + mlp(norm(x))."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = NanochatAttention(config, layer_idx)
        self.mlp = NanochatMLP(config)

    def forward(self, hidden_states, value_embedding, rope, attention_mask=None, past_key_values=None, **kwargs):
        attended, _ = self.self_attn(norm(hidden_states), value_embedding, rope, attention_mask, past_key_values, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(norm(hidden_states))


def linear(inputs, outputs, init_scheme="uniform"):
    """A Linear without bias that knows how it is initialised."""
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.init_scheme = init_scheme
    return layer


def has_value_embedding(config, layer_idx):
    """Every second layer has a table of value embeddings, the last one always."""
    return layer_idx % 2 == (config.num_hidden_layers - 1) % 2


def padded(vocab_size):
    """Rows of the vocabulary's tables: the next multiple of 64, which matrix kernels like."""
    return -(-vocab_size // 64) * 64


class NanochatPreTrainedModel(PreTrainedModel):
    """What both models share: flags for transformers, and the initialisation."""

    config_class = NanochatConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanochatDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["resid_lambdas", "x0_lambdas"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        # transformers asks only modules that own parameters, so each of them carries the name of its distribution
        s = (3 / self.config.hidden_size) ** 0.5  # uniform(−s, s) has the standard deviation 1/√C
        if isinstance(module, NanochatModel):
            init.constant_(module.resid_lambdas, 1.0)
            init.constant_(module.x0_lambdas, 0.1)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            fill = {
                "unit": lambda w: init.normal_(w, std=1.0), "head": lambda w: init.normal_(w, std=0.001),
                "uniform": lambda w: init.uniform_(w, -s, s), "zero": init.zeros_,
            }  # fmt: skip
            fill[getattr(module, "init_scheme", "uniform")](module.weight)


class NanochatModel(NanochatPreTrainedModel):
    """Ids (B, T) → normed hidden states (B, T, C)."""

    def __init__(self, config):
        super().__init__(config)
        rows, width = padded(config.vocab_size), config.num_key_value_heads * config.head_dim
        layers = range(config.num_hidden_layers)
        self.embed_tokens = nn.Embedding(rows, config.hidden_size)
        self.embed_tokens.init_scheme = "unit"
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(rows, width) for i in layers if has_value_embedding(config, i)})
        self.layers = nn.ModuleList(NanochatDecoderLayer(config, i) for i in layers)
        self.resid_lambdas = nn.Parameter(torch.ones(config.num_hidden_layers))
        self.x0_lambdas = nn.Parameter(torch.full((config.num_hidden_layers,), 0.1))
        self.gradient_checkpointing = False
        self.post_init()

    def rope(self, position_ids):
        """cos and sin (2, B, T, 1, D/2) for any position; computed, not stored, so that no length is too long."""
        return torch.ops.nanochat_hf.rope(position_ids, self.config.head_dim, float(self.config.rope_theta))

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        use_cache=None, output_hidden_states=None, **kwargs,
    ):  # fmt: skip
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("inputs_embeds cannot replace input_ids: value embeddings are looked up by id; give input_ids")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        x = self.embed_tokens(input_ids)  # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            # the residual stream in the low precision too, as with the reference's bfloat16 table: half the bytes of every norm and sum
            x = x.to(torch.get_autocast_dtype(x.device.type))
        own_positions = position_ids
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(input_ids.shape[1], device=x.device) + past).unsqueeze(0)
        masking = dict(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=past_key_values,
            position_ids=own_positions,
        )  # fmt: skip
        masks = attention_mask  # generation with a static cache brings both masks ready made
        if not isinstance(attention_mask, dict):
            masks = {"full_attention": create_causal_mask(**masking)}
            if "sliding_attention" in self.config.layer_types:
                masks["sliding_attention"] = create_sliding_window_causal_mask(**masking)
        if use_cache and past_key_values is None:
            # made after the masks, which isolate documents only where no cache is given
            past_key_values = DynamicCache(config=self.config)
        rope = self.rope(position_ids)
        x = x0 = norm(x)
        hidden = () if output_hidden_states else None
        for i, layer in enumerate(self.layers):
            hidden = (*hidden, x) if output_hidden_states else None
            # float32 scalars do not promote x, and cast to bfloat16 they would lose what training writes into them
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            table = self.value_embeds[str(i)](input_ids) if str(i) in self.value_embeds else None
            mask = masks[self.config.layer_types[i]]
            # the cache goes by keyword: gradient checkpointing drops it by name, lest the recomputation write it twice
            x = layer(x, table, rope, mask, past_key_values=past_key_values, position_ids=own_positions, **kwargs)
        x = norm(x)
        hidden = (*hidden, x) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values, hidden_states=hidden)


def nll_and_slope(logits, target, weight, cap):
    """Uncapped logits (n, V), targets (n) with −100 ignored, weights (n) → weight·nll (n) float32, its gradient (n, V)."""
    weight, target = torch.where(target == -100, 0.0, weight).unsqueeze(1), target.clamp(min=0).unsqueeze(1)  # (n, 1)
    squashed = torch.tanh(logits.float() / cap)
    lse = torch.logsumexp(cap * squashed, dim=1, keepdim=True)
    nll = (lse - cap * squashed.gather(1, target)) * weight
    wrong = torch.exp(cap * squashed - lse) - (torch.arange(logits.shape[1], device=target.device) == target).float()
    return nll.squeeze(1), (wrong * weight * (1 - squashed.square())).to(logits.dtype)


class SoftcappedLoss(torch.autograd.Function):
    """Σ weight·nll of soft-capped logits, whose gradient is taken in the forward pass, chunk by chunk.

    The logits of a chunk are read while they exist and never made again: no (N, V) tensor, and no second product with the head.
    hidden (N, C), head (rows, C), targets (N) with −100 ignored, weights (N) float32 → 0-d float32.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, weights, vocab_size, cap, chunk, nll_and_slope):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            table = head[:vocab_size].to(dtype)
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            grad_head = torch.zeros(table.shape, dtype=torch.float32, device=hidden.device)
            grads = []
            for h, target, weight in zip(hidden.to(dtype).split(chunk), targets.split(chunk), weights.split(chunk), strict=True):
                nll, slope = nll_and_slope(h @ table.mT, target, weight, cap)
                total = total + nll.sum()
                grads.append((slope @ table).to(hidden.dtype))
                grad_head += (slope.mT @ h).float()
        ctx.save_for_backward(torch.cat(grads), grad_head)
        ctx.head = head.shape[0] - vocab_size, head.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, grad_head = ctx.saved_tensors
        padding, dtype = ctx.head
        grad_head = F.pad((grad_head * grad_output).to(dtype), (0, 0, 0, padding))
        return (grad_hidden * grad_output).to(grad_hidden.dtype), grad_head, None, None, None, None, None, None


class NanochatForCausalLM(NanochatPreTrainedModel, GenerationMixin):
    """The language model: head and soft-cap on NanochatModel, and the loss."""

    def __init__(self, config):
        super().__init__(config)
        self.model = NanochatModel(config)
        self.lm_head = linear(config.hidden_size, padded(config.vocab_size), "head")
        self.nll_and_slope = nll_and_slope  # a kernel may take its place
        self.post_init()

    def logits(self, hidden):
        """Hidden states (…, C) → float32 logits (…, V), cut to the vocabulary and soft-capped."""
        cap = self.config.final_logit_softcapping
        return cap * torch.tanh(self.lm_head(hidden)[..., : self.config.vocab_size].float() / cap)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, labels=None,
        shift_labels=None, loss_weights=None, num_items_in_batch=None, use_cache=None, logits_to_keep=0, **kwargs,
    ):  # fmt: skip
        """loss = Σ nll·weight ÷ num_items_in_batch (default: valid targets of this call). `labels` (B, T) are unshifted,
        `shift_labels` (B, T) hold the target of each position; −100 is ignored. In training the logits are None."""
        output = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs)
        hidden = output.last_hidden_state
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
        loss = logits = None
        if shift_labels is not None:
            loss = self._loss(hidden, shift_labels, loss_weights)
            # without a single valid target the loss is 0, not NaN
            loss = loss / ((shift_labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        if shift_labels is None or not self.training:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
            logits = self.logits(hidden if isinstance(keep, int) else hidden[:, keep])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states)

    def _loss(self, hidden, targets, weights):
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights.flatten().float()
        if self.training and torch.is_grad_enabled() and type(self.lm_head) is nn.Linear:
            return SoftcappedLoss.apply(
                hidden, self.lm_head.weight, targets, weights, self.config.vocab_size, self.config.final_logit_softcapping, LOSS_CHUNK,
                self.nll_and_slope,
            )
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(targets), LOSS_CHUNK):
            part = slice(start, start + LOSS_CHUNK)
            # a head that adapters or quantisation have replaced is recomputed in backward, one chunk of logits at a time
            save = self.training and len(targets) > LOSS_CHUNK
            arguments = hidden[part], targets[part], weights[part]
            total = total + (checkpoint(self._chunk, *arguments, use_reentrant=False) if save else self._chunk(*arguments))
        return total

    def _chunk(self, hidden, targets, weights):
        return (F.cross_entropy(self.logits(hidden), targets, ignore_index=-100, reduction="none") * weights).sum()
