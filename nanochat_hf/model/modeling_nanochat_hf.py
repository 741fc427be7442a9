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
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_nanochat_hf import NanochatConfig
from .loss_nanochat_hf import SoftcappedLoss, add_product, nll_and_slope

GATE_CHANNELS = 32
LOSS_CHUNK = 8192  # tokens whose logits exist at one time: 512 MiB in bfloat16 at V = 32768


def norm(x, eps=None):
    """RMS norm over the last axis, without a weight; eps None is the dtype's own. Autocast may not widen the stream."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps).to(x.dtype)


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


def _angles(position_ids, head_dim, theta):
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim)
    return position_ids[:, :, None, None].float() * frequency  # (B, T, 1, D/2)


def _rope(position_ids: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    angle = _angles(position_ids, head_dim, theta)
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
        # in training, kernels in place of `queries_keys_values`, of the sum with o_proj's result, of the gated lookup and, without mask and cache, of all
        # before o_proj may stand here
        self.fused = self.fused_output = self.fused_gate = self.fused_whole = None

    def queries_keys_values(self, x, rope):
        """Rotated and normed q (B, T, H, D) and k (B, T, K, D), and v (B, T, K, D)."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        return *self.rotated(q, k, rope), v

    def rotated(self, q, k, rope):
        """q and k, rotated and normed."""
        cos, sin = (t.to(q.dtype) for t in rope)
        # norm after RoPE, so that attention logits stay bounded (arXiv:2302.05442)
        eps = self.config.rms_norm_eps
        return norm(rotate(q, cos, sin), eps), norm(rotate(k, cos, sin), eps)

    def gate(self, first):
        """What x's `first` channels let through of the value embedding: (B, T, K), None in layers without one."""
        return None if self.ve_gate is None else (2 * torch.sigmoid(self.ve_gate(first))).to(first.dtype)

    def gated(self, gate, value_embedding):
        """What the value embedding (B, T, K·D), or the arguments of `fused_gate`, adds to v: (B, T, K, D), None without one."""
        if gate is None or isinstance(value_embedding, tuple):
            return None if gate is None else self.fused_gate(gate, *value_embedding)
        return gate.unsqueeze(-1) * value_embedding.view(*gate.shape, -1).to(gate.dtype)

    def attend(self, x, value, rope, attention_mask, past_key_values, **kwargs):
        """Normed x (B, T, C) → heads' results (B, T, H, D), attention weights where the implementation has them."""
        q, k, v = self.fused(self, x, rope) if self.fused and self.training else self.queries_keys_values(x, rope)
        v = v if value is None else v + value.to(v.dtype)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D), (B, K, T, D); views, after all that reads memory in order
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        options = dict(dropout=0.0, scaling=self.scaling, sliding_window=self.sliding_window)
        return attention(self, q, k.to(q.dtype), v.to(q.dtype), attention_mask, **options, **kwargs)

    def forward(self, stream, x, first, value_embedding, rope, attention_mask, past_key_values, **kwargs):
        """The stream (B, T, C) with what attention adds, by its norm x and that norm's `first` channels; attention weights or None."""
        gate, y, weights = self.gate(first), None, None
        if self.fused_whole and self.training and attention_mask is None and past_key_values is None:
            y = self.fused_whole(self, x, gate, value_embedding, rope, kwargs.get("cu_seq_lens_q"))
        if y is None:
            y, weights = self.attend(x, self.gated(gate, value_embedding), rope, attention_mask, past_key_values, **kwargs)
        y = y.flatten(2)
        return self.fused_output(self, y, stream) if self.fused_output and self.training else stream + self.o_proj(y), weights


class NanochatMLP(nn.Module):
    """C → 4C → C with relu(·)²."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size, "zero")
        self.fused = None  # in training, a kernel in place of `squared_relu` may stand here

    def forward(self, x):
        return self.fused(self, x) if self.fused and self.training else self.squared_relu(x)

    def squared_relu(self, x):
        """The formula, by the modules."""
        return self.down_proj(F.relu(self.up_proj(x)).square())


class NanochatDecoderLayer(GradientCheckpointingLayer):
    """x ← x + attn(norm(x)), then x ← x + mlp(norm(x))."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn = NanochatAttention(config, layer_idx)
        self.mlp = NanochatMLP(config)
        self.fused_norm = None  # in training, a kernel that gives the stream and its norm may stand here

    def forward(self, hidden_states, value_embedding, rope, attention_mask=None, past_key_values=None, normed=None, apart=False, **kwargs):
        """`normed`: norm(x) and its first channels, where they are known. `apart`: x and mlp(…), not yet summed."""
        if normed is None:
            normed = norm(hidden_states, self.eps)
            normed = normed, normed[..., :GATE_CHANNELS]
        hidden_states, _ = self.self_attn(hidden_states, *normed, value_embedding, rope, attention_mask, past_key_values, **kwargs)
        if self.fused_norm and self.training:
            hidden_states, normed = self.fused_norm(hidden_states, self.eps)
        else:
            normed = norm(hidden_states, self.eps)
        update = self.mlp(normed)
        return (hidden_states, update) if apart else hidden_states + update


def linear(inputs, outputs, init_scheme="uniform"):
    """A Linear without bias that knows how it is initialised."""
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.init_scheme = init_scheme
    return layer


def has_value_embedding(config, layer_idx):
    """Every second layer has a table of value embeddings, the last one always; none has where the config says so."""
    return config.use_value_embeddings and layer_idx % 2 == (config.num_hidden_layers - 1) % 2


def table_rows(config):
    """Rows of the vocabulary's tables, V rounded up: matrix kernels like multiples of 64."""
    multiple = config.pad_vocab_to_multiple_of
    return -(-config.vocab_size // multiple) * multiple


@torch.compiler.disable  # one break of the graph, in place of one that the search itself makes
def varlen_arguments(position_ids, batch_size, device=None):
    """What FlashAttention needs to keep packed documents apart: {cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k}, on `device`.

    A document begins with each row and wherever positions (B or 1, T) do not go on by one:
    [[0, 1, 2, 0, 1]] → cu_seq_lens [0, 3, 5]. transformers itself looks for documents at B = 1 only, and then anew in every layer.
    """
    begins = torch.diff(position_ids, prepend=position_ids[:, :1], dim=-1) != 1  # a row's first difference is 0
    begins = begins.expand(batch_size, -1).flatten().nonzero().flatten()
    borders = F.pad(begins, (0, 1), value=batch_size * position_ids.shape[1]).int().to(device, non_blocking=True)  # (documents + 1)
    torch._dynamo.maybe_mark_dynamic(borders, 0)  # or every other number of documents would compile the layers anew, dynamic=False or not
    longest = position_ids.shape[1]  # a bound will do, and costs no wait for the device
    return dict(cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=longest, max_length_k=longest)


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
    _can_record_outputs = {"attentions": NanochatAttention}

    @property
    def dtype(self):
        """The dtype of the weights; the float32 scalars, which come first among the parameters, do not decide it."""
        return self.get_input_embeddings().weight.dtype

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        """What resize_token_embeddings does to the weights: of embedding, value embeddings and head, wherever the model has them.

        Rows that only pad the vocabulary go first, so that afterwards each row is a token, as transformers has it.
        """
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.get_input_embeddings()
        if new_num_tokens is not None and new_num_tokens < 1:
            raise ValueError(f"new_num_tokens={new_num_tokens} must be positive: give the number of tokens of the tokenizer")
        tokens, value_tables = self.config.vocab_size, list(self.base_model.value_embeds.values())
        self.config.pad_vocab_to_multiple_of = 1
        for table in filter(None, (self.get_input_embeddings(), self.get_output_embeddings(), *value_tables)):
            table.weight = nn.Parameter(table.weight.detach()[:tokens].clone(), requires_grad=table.weight.requires_grad)
            setattr(table, "num_embeddings" if isinstance(table, nn.Embedding) else "out_features", tokens)
        embedding = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        for table in value_tables:
            trained = table.weight.requires_grad
            self._get_resized_embeddings(table, embedding.num_embeddings, mean_resizing=mean_resizing).requires_grad_(trained)
        head = self.get_output_embeddings()
        if head is not None:
            head.init_scheme = "head"  # transformers has made a new layer
        if not mean_resizing:  # transformers knows one distribution for all tables, these have one each
            for table in filter(None, (embedding, head, *value_tables)):
                old = table.weight.detach().clone()
                self._init_weights(table)
                table.weight.data[:tokens] = old[:tokens]
        return embedding

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
        rows, width = table_rows(config), config.num_key_value_heads * config.head_dim
        layers = range(config.num_hidden_layers)
        self.embed_tokens = nn.Embedding(rows, config.hidden_size)
        self.embed_tokens.init_scheme = "unit"
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(rows, width) for i in layers if has_value_embedding(config, i)})
        self.layers = nn.ModuleList(NanochatDecoderLayer(config, i) for i in layers)
        self.resid_lambdas = nn.Parameter(torch.ones(config.num_hidden_layers))
        self.x0_lambdas = nn.Parameter(torch.full((config.num_hidden_layers,), 0.1))
        self.gradient_checkpointing = False
        self.fused_mix = None  # in training, a kernel for the stream before a layer and its norm may stand here,
        self.fused_tables = None  # and one for the value embeddings, which it looks up by their gates
        self.post_init()

    def rope(self, position_ids):
        """cos and sin (2, B, T, 1, D/2) for any position; computed, not stored, so that no length is too long."""
        head_dim, theta = self.config.head_dim, float(self.config.rope_theta)
        if self.config.rope_in_bfloat16:
            return torch.ops.nanochat_hf.rope(position_ids, head_dim, theta)
        angle = _angles(position_ids, head_dim, theta)
        return torch.stack((angle.cos(), angle.sin()))

    @capture_outputs
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        use_cache=None, output_hidden_states=None, **kwargs,
    ):  # fmt: skip
        """`position_ids` (B, T) that start again within a row keep the documents there apart, given neither mask nor cache.
        hidden_states: the stream before each layer, then what the head reads."""
        if input_ids is None and (inputs_embeds is None or self.config.use_value_embeddings):
            raise ValueError("inputs_embeds cannot replace input_ids: value embeddings are looked up by id; give input_ids")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            # the residual stream in the low precision too, as with the reference's bfloat16 table: half the bytes of every norm and sum
            x = x.to(torch.get_autocast_dtype(x.device.type))
        masks, documents = self._masks(x, attention_mask, position_ids, past_key_values, "cu_seq_lens_q" in kwargs)
        kwargs = documents | kwargs
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(x.shape[1], device=x.device) + past).unsqueeze(0)
        if use_cache and past_key_values is None:
            # made after the masks, which isolate documents only where no cache is given
            past_key_values = DynamicCache(config=self.config)
        rope = self.rope(position_ids)
        x = x0 = norm(x, self.config.rms_norm_eps)
        # gradient checkpointing would keep what the kernel gives beside the stream
        fused = None if self.gradient_checkpointing or output_hidden_states or not self.training else self.fused_mix
        tables = self.fused_tables(self.value_embeds, input_ids, x.dtype) if self.fused_tables and self.training else {}
        hidden = []
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                hidden.append(x)
            # float32 scalars do not promote x, and cast to bfloat16 they would lose what training writes into them;
            # .to() does nothing unless device_map has put this layer elsewhere
            device = x0.device if fused else x.device
            resid, skip = self.resid_lambdas[i].to(device), self.x0_lambdas[i].to(device)
            table, normed = tables[i] if i in tables else self.value_embeds[str(i)](input_ids) if str(i) in self.value_embeds else None, None
            if fused and i:
                channels = 0 if table is None else GATE_CHANNELS
                x, *normed, x0 = fused(*x, x0, resid, skip, self.config.rms_norm_eps, channels)
            else:
                x = resid * x + skip * x0.to(x.device)
            # the cache goes by keyword: gradient checkpointing drops it by name, lest the recomputation write it twice
            x = layer(
                x, table, rope, masks[self.config.layer_types[i]], past_key_values=past_key_values, normed=normed, apart=bool(fused), **kwargs
            )  # fmt: skip
        if fused:
            x = x[0] + x[1]
        x = norm(x, self.config.rms_norm_eps)
        hidden = (*hidden, x) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values, hidden_states=hidden)

    def document_borders(self, position_ids, device):
        """Arguments that `forward` would otherwise make of position_ids (B, T), {} where the attention takes none: made of those that still lie
        on the host they cost no wait for the device, and leave the graph whole."""
        takes = self.takes_borders and position_ids is not None
        return varlen_arguments(position_ids, position_ids.shape[0], device) if takes else {}

    @property
    def takes_borders(self):
        """Whether the attention keeps documents apart by their borders, not by a mask."""
        return "flash" in self.config._attn_implementation or self.config._attn_implementation == "cudnn"

    def _masks(self, x, attention_mask, position_ids, past_key_values, given):
        """{layer type: mask}, and the arguments by which attention that takes no mask of documents keeps them apart, if not `given`."""
        kind, flash = self.config._attn_implementation, self.takes_borders
        documents = {} if flash else dict(position_ids=position_ids)
        if isinstance(attention_mask, dict):
            return attention_mask, documents  # generation with a static cache brings both masks ready made
        # borders in place of positions: those transformers would search in every layer, and at B = 1 under mask and cache too
        wanted = flash and not given and position_ids is not None and attention_mask is None and past_key_values is None
        borders = varlen_arguments(position_ids, x.shape[0]) if wanted else {}
        if kind == "cudnn" and attention_mask is None and past_key_values is None:  # transformers would make SDPA's masks of the positions
            return dict.fromkeys(("full_attention", "sliding_attention")), borders
        masking = dict(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=past_key_values, position_ids=position_ids,
        )  # fmt: skip
        masks = {"full_attention": create_causal_mask(**masking)}
        if "sliding_attention" in self.config.layer_types:
            masks["sliding_attention"] = create_sliding_window_causal_mask(**masking)
        return masks, documents | borders


class NanochatForCausalLM(NanochatPreTrainedModel, GenerationMixin):
    """The language model: head and soft-cap on NanochatModel, and the loss."""

    def __init__(self, config):
        super().__init__(config)
        self.model = NanochatModel(config)
        self.lm_head = linear(config.hidden_size, table_rows(config), "head")
        self.nll_and_slope, self.add_product = nll_and_slope, add_product  # kernels may take their place
        self.post_init()

    def logits(self, hidden):
        """Hidden states (…, C) → float32 logits (…, V), cut to the vocabulary and soft-capped."""
        cap = self.config.final_logit_softcapping
        return cap * torch.tanh(self.lm_head(hidden)[..., : self.config.vocab_size].float() / cap)

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, labels=None,
        loss_weights=None, num_items_in_batch=None, use_cache=None, logits_to_keep=0, skip_logits=None, **kwargs,
    ):  # fmt: skip
        """loss = Σ nll·weight ÷ num_items_in_batch (default: valid targets of this call). `labels` (B, T) are unshifted,
        `shift_labels` (B, T) hold the target of each position; −100 is ignored. `skip_logits` leaves the logits out (None); by default
        training with targets does, since float32 logits would be its largest tensor."""
        # not among the named arguments, since Trainer takes each of those with "label" in its name for a column that evaluation needs
        shift_labels = kwargs.pop("shift_labels", None)
        output = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, return_dict=True, **kwargs
        )  # fmt: skip
        hidden = output.last_hidden_state
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
        loss = logits = None
        if shift_labels is not None:
            loss = self._loss(hidden, shift_labels, loss_weights)
            # without a single valid target the loss is 0, not NaN
            loss = loss / ((shift_labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        if skip_logits is None:
            skip_logits = self.training and shift_labels is not None
        if not skip_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
            logits = self.logits(hidden if isinstance(keep, int) else hidden[:, keep])
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states, attentions=output.attentions,
        )  # fmt: skip

    def _loss(self, hidden, targets, weights):
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights.flatten().float()
        if self.training and torch.is_grad_enabled() and type(self.lm_head) is nn.Linear:
            return SoftcappedLoss.apply(
                hidden, self.lm_head.weight, targets, weights, self.config.vocab_size, self.config.final_logit_softcapping, LOSS_CHUNK,
                self.nll_and_slope, self.add_product,
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
