"""Causal attention by cuDNN with windows and packed documents: operators of torch, and a name for transformers.

Letters: B rows, T positions, H query heads, K key/value heads, D head_dim.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cudnn_graph import run

# no name with "flash" in it: transformers looks for those among FlashAttention's packages and on the Hub
NAME = "cudnn"
# cuDNN 9.6 is the first with ragged statistics, with grouped key heads in packed rows, and with a workspace that grows
# only with the number of tokens
OLDEST = 90600
WIDEST = 128  # largest head_dim; support for larger ones depends on GPU and version


def missing(device: torch.device) -> tuple[str, str] | None:
    """Why cuDNN's attention cannot run on `device`, and the remedy; None where it can."""
    other = "use sdpa or auto"
    if device.type != "cuda":
        return "its kernels need a CUDA device", other
    if find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend is not installed", f"pip install nvidia-cudnn-frontend, or {other}"
    if torch.cuda.get_device_capability(device)[0] < 9:  # packed documents: "only supported in Hopper and above"
        return "the GPU is older than Hopper", other
    try:
        import cudnn

        version = cudnn.backend_version()
    except Exception as error:  # a wheel for another Python, another package of that name, no libcudnn
        return (
            f"cudnn cannot be imported ({type(error).__name__}: {error})",
            f"pip install -U nvidia-cudnn-frontend, or {other}",
        )
    if version < OLDEST:
        return f"cuDNN {version} is older than {OLDEST}", f"install a newer torch or nvidia-cudnn, or {other}"
    return None


def _ready(tensor, packed):
    """The tensor, or a copy if kernels cannot read it. They need 16-byte vectors and evenly spaced packed tokens."""
    whole, (B, T, *_), (row, token, *_) = 16 // tensor.element_size(), tensor.shape, tensor.stride()
    aligned = (
        tensor.stride(-1) == 1
        and all(s and s % whole == 0 for s in tensor.stride()[:-1])
        and tensor.data_ptr() % 16 == 0
    )
    even = not packed or B == 1 or row == T * token
    return tensor if aligned and even else tensor.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("nanochat_hf::cudnn_attention", mutates_args=())
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: torch.Tensor | None, scale: float, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, T, H, D), k and v (B, T, K, D), any strides → out (B, T, H, D), log-sum-exp float32.

    The log-sum-exp is (B, T, H) with `borders`, else (B, H, T). A query sees the keys at distances 0 to window − 1;
    with window 0 its own and all before it. `borders`: int32 offsets of the documents among the B·T tokens, [0, …,
    B·T]; no document is empty or longer than T. None: each row is one document. RuntimeError where cuDNN refuses.
    """
    q, k, v = (_ready(t, borders is not None) for t in (q, k, v))
    B, T, H, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    stats = torch.empty((B, H, T) if borders is None else (B, T, H), dtype=torch.float32, device=q.device)
    run(False, {"q": q, "k": k, "v": v, "o": out, "stats": stats}, scale, window, borders)
    return out, stats


@torch.library.custom_op("nanochat_hf::cudnn_attention_backward", mutates_args=())
def attention_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    borders: torch.Tensor | None,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attention`'s out with respect to q, k and v, contiguous, from its inputs and outputs."""
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    write_gradients((dq, dk, dv), do, q, k, v, out, stats, borders, scale, window)
    return dq, dk, dv


def write_gradients(
    into: tuple[Tensor, Tensor, Tensor],
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    borders: Tensor | None,
    scale: float,
    window: int,
) -> None:
    """As `attention_backward`, but write to the given tensors (dq, dk, dv), which may be parts of one."""
    q, k, v, out, do = (_ready(t, borders is not None) for t in (q, k, v, out, do))
    read = {"q": q, "k": k, "v": v, "o": out, "do": do, "stats": stats.contiguous()}
    run(True, read | dict(zip(("dq", "dk", "dv"), into, strict=True)), scale, window, borders)


@attention.register_fake
def _(q, k, v, borders, scale, window):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T) if borders is None else (B, T, H), dtype=torch.float32)


@attention_backward.register_fake
def _(do, q, k, v, out, stats, borders, scale, window):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx, inputs, output):
    q, k, v, borders, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, borders)
    ctx.set_materialize_grads(False)


def _gradients(ctx, do, _):
    return *attention_backward(do, *ctx.saved_tensors, ctx.scale, ctx.window), None, None, None


attention.register_autograd(_gradients, setup_context=_keep)


def runs(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the operator takes q (B, T, H, D), k and v (B, S, K, D): whole rows of half precision on CUDA.

    Without gradients only lengths that are multiples of 128. Evaluation and generation come with new lengths all the
    time, and to build a graph for each would cost more than it saves.
    """
    (_, T, _, D), half = q.shape, (torch.bfloat16, torch.float16)
    return (
        q.device.type == "cuda"
        and q.dtype == k.dtype == v.dtype
        and q.dtype in half
        and v.shape[-1] == D
        and D % 8 == 0
        and D <= WIDEST
        and k.shape[1] == T > 1
        and (torch.is_grad_enabled() or T % 128 == 0)
    )


def packed_mask(shape: tuple[int, int], borders: Tensor | None, window: int, device: torch.device) -> Tensor:
    """Mask (B or 1, 1, T, T), True where a query sees a key. `shape`: (B, T); window 0: none."""
    B, T = shape
    distance = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)
    mask = (distance >= 0) & (distance < (window or T))
    if borders is None:
        return mask[None, None]
    number = torch.bucketize(torch.arange(B * T, device=device), borders.long(), right=True).view(B, 1, T)
    return mask & (number.unsqueeze(-1) == number.unsqueeze(-2))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention for transformers: query (B, H, T, D), key and value (B, K, S, D) → (B, T, H, D), None.

    SDPA computes the same thing where there is a mask, where queries continue a cache, and for what cuDNN does not
    support.
    """
    (B, _, T, D), window = query.shape, sliding_window or 0
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if attention_mask is None and not dropout and runs(q, k, v):
        scale = D**-0.5 if scaling is None else scaling
        return torch.ops.nanochat_hf.cudnn_attention(q, k, v, cu_seq_lens_q, scale, window)[0], None
    if attention_mask is None and key.shape[2] == T and (cu_seq_lens_q is not None or 0 < window < T):
        attention_mask = packed_mask((B, T), cu_seq_lens_q, window, query.device)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sdpa(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        sliding_window=sliding_window,
        **kwargs,
    )


# so that the model passes the borders of documents and no mask, see masks_nanochat_hf.py
attend.takes_borders = True  # ty: ignore[missing-attribute]  functions take any attribute


def register() -> str:
    """Make `attend` known to transformers and return its name there. Its masks have SDPA's form."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    return NAME
