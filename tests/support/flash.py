"""FlashAttention's public functions in plain torch, and transformers persuaded to call them on the CPU.

Letters: B rows, Q queries, S keys, H query heads, K key/value heads, D head_dim. The meaning is that of flash-attn, by
its own docstrings; the parameter names are those of flash-attn 2.8, of FlashAttention 3 (`flash_attn_interface`) and of
flash-attn-4 4.0.0b36.
"""

import sys
from inspect import Parameter, Signature
from types import ModuleType, SimpleNamespace

import torch
from transformers import modeling_flash_attention_utils as flash_utils
from transformers import modeling_utils
from transformers.integrations import hub_kernels

QKV, VARLEN = "q k v", "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
PARAMETERS = {  # version: (flash_attn_func's, flash_attn_varlen_func's), in the order in which they are declared
    2: (
        f"{QKV} dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs",
        f"{QKV} {VARLEN} dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
        "return_attn_probs block_table",
    ),
    3: (
        f"{QKV} softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk softcap num_splits "
        "pack_gqa deterministic sm_margin return_attn_probs",
        f"{QKV} {VARLEN} seqused_q seqused_k softmax_scale causal qv q_descale k_descale v_descale window_size "
        "attention_chunk softcap num_splits pack_gqa deterministic sm_margin return_attn_probs",
    ),
    4: (
        f"{QKV} qv gather_kv_indices softmax_scale causal window_size learnable_sink softcap num_splits pack_gqa "
        "deterministic score_mod score_mod_bwd mask_mod aux_tensors aux_scalars block_sparse_tensors "
        "block_sparse_tensors_bwd return_lse gather_bwd_recompute_p gather_bwd_token_chunk",
        f"{QKV} qv {VARLEN} min_seqlen_k seqused_q seqused_k gather_kv_indices page_table softmax_scale causal "
        "window_size learnable_sink softcap num_splits pack_gqa deterministic score_mod score_mod_bwd mask_mod "
        "block_sparse_tensors aux_tensors aux_scalars return_lse scheduler_metadata seqlen_k_per_split "
        "disable_scheduler_metadata gather_bwd_recompute_p gather_bwd_token_chunk",
    ),
}
NAMES = {  # implementation: the version whose functions it calls
    "flash_attention_2": 2,
    "flash_attention_3": 3,
    "flash_attention_4": 4,
    "kernels-community/flash-attn2": 2,
    "kernels-community/vllm-flash-attn3": 3,
    "kernels-community/flash-attn4": 4,
}
MEANT = {"softmax_scale", "causal", "window_size", *QKV.split(), *VARLEN.split()}


def attention(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """One sequence: q (Q, H, D), k and v (S, K, D) → (Q, H, D). A query that sees no key gives zeros.

    The last query stands at the last key: query i sees keys i + S − Q − left to i + S − Q + right, both included. A
    side that is −1 or None has no limit, and causal sets right to 0.
    """
    left, right = (None if side in (None, -1) else side for side in window_size)
    place = torch.arange(len(q))[:, None] + len(k) - len(q)  # of each query among the keys (Q, 1)
    distance = torch.arange(len(k)) - place  # (Q, S)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        seen &= distance >= -left
    if causal or right is not None:
        seen &= distance <= (0 if causal else right)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("qhd,shd->hqs", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0)
    return torch.einsum("hqs,shd->qhd", weights, v)


class FlashAttention:
    """The functions of one version, and what they were called with: `calls` of (name, arguments)."""

    def __init__(self, version):
        self.version, self.calls = version, []
        self.flash_attn_func = self._declared("flash_attn_func", PARAMETERS[version][0], self._rows)
        self.flash_attn_varlen_func = self._declared("flash_attn_varlen_func", PARAMETERS[version][1], self._documents)

    def _declared(self, name, parameters, compute):
        optional = [
            Parameter(p, Parameter.POSITIONAL_OR_KEYWORD, default=None)
            for p in parameters.split()
            if p not in QKV.split()
        ]
        signature = Signature([Parameter(p, Parameter.POSITIONAL_OR_KEYWORD) for p in QKV.split()] + optional)

        def function(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments  # TypeError for a keyword that the real one does not take
            self.calls.append((name, given))
            assert not any(value for key, value in given.items() if key not in MEANT), (
                "the stand-in computes no more than plain attention"
            )
            return compute(**{key: value for key, value in given.items() if key in MEANT})

        function.__signature__ = signature  # transformers asks it which keywords this version takes
        return function

    def _rows(self, q, k, v, **options):
        assert q.shape[::2] == (len(k), q.shape[2]) and k.shape == v.shape and q.dtype == k.dtype == v.dtype
        return self._returned(torch.stack([attention(*row, **options) for row in zip(q, k, v, strict=True)]))

    def _documents(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        pieces = []
        assert q.dim() == k.dim() == 3 and k.shape == v.shape and q.dtype == k.dtype == v.dtype
        for borders, longest, tensor in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
            assert borders.dtype == torch.int32 and borders[0] == 0 and borders[-1] == len(tensor)
            assert borders.diff().max() <= longest  # the kernel would leave out what lies behind
            pieces.append(borders.diff().tolist())
        q, k, v = q.split(pieces[0]), k.split(pieces[1]), v.split(pieces[1])
        return self._returned(torch.cat([attention(*document, **options) for document in zip(q, k, v, strict=True)]))

    def _returned(self, out):
        return (out, None) if self.version == 4 else out  # that version returns the log-sum-exp too


def unpad_input(hidden_states, attention_mask):
    """(B, S, …), mask (B, S) → tokens in line, their indices, starts of the rows, the longest row, and lengths.

    As unpad_input of flash_attn.bert_padding.
    """
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    indices = attention_mask.flatten().nonzero().flatten()
    borders = torch.cat((lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)))
    return hidden_states.flatten(0, 1)[indices], indices, borders, lengths.max().item(), lengths


def pad_input(hidden_states, indices, batch, seqlen):
    """The way back: tokens in line → (B, S, …), zeros elsewhere."""
    out = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return out.index_put((indices,), hidden_states).unflatten(0, (batch, seqlen))


def install(monkeypatch, name):
    """Let transformers find these functions where it looks for those of `name`; returns the FlashAttention.

    All of transformers' own code before them runs.
    """
    functions = FlashAttention(NAMES[name])
    public = dict(flash_attn_func=functions.flash_attn_func, flash_attn_varlen_func=functions.flash_attn_varlen_func)
    kvcache = dict(flash_attn_with_kvcache=None)  # for continuous batching alone
    modules = {"flash_attn": kvcache | public, "flash_attn_interface": kvcache | public, "flash_attn.cute": public}
    modules["flash_attn.bert_padding"] = dict(pad_input=pad_input, unpad_input=unpad_input)
    for module, members in modules.items():
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
        vars(sys.modules[module]).update(members)
    for version in (2, 3, 4):
        monkeypatch.setattr(flash_utils, f"is_flash_attn_{version}_available", lambda: True)
        there = dict(
            general_availability_check=lambda: True,
            pkg_availability_check=lambda: True,
            supported_devices=((lambda: True, "cpu"),),
        )
        monkeypatch.setitem(
            modeling_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX, version, dict(flash_attn_version=version, **there)
        )
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *args, **kwargs: SimpleNamespace(**public))
    for loaded in (
        "_loaded_implementation",
        "_flash_fn",
        "_flash_varlen_fn",
        "_pad_fn",
        "_unpad_fn",
        "_process_flash_kwargs_fn",
    ):
        monkeypatch.setattr(flash_utils, loaded, None)
    return functions
