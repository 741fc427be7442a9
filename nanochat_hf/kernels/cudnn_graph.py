"""cuDNN's graphs of causal attention with windows and packed documents, by the package nvidia-cudnn-frontend (module `cudnn`).

Letters: B rows, T positions, H query heads, K key/value heads, D head_dim, n documents with those that only fill the list up. The facts come
from NVIDIA/cudnn-frontend 1.18: docs/operations/Attention.md and include/cudnn_frontend/node/scaled_dot_product_flash_attention.h.
"""

import functools
import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F

FEWEST = 64  # documents a graph is built for; above, powers of two: few graphs serve all batches
ROW, HEADS = ("q", "k", "v", "o", "do"), {"q": "H", "o": "H", "do": "H", "dq": "H", "stats": "H"}  # others have K heads
UID = {name: i for i, name in enumerate(
    ("q", "k", "v", "o", "stats", "do", "dq", "dk", "dv", "length_q", "length_kv", "q at", "k at", "v at", "o at", "stats at"), 1
)}  # fmt: skip
PLACED = {"q": "q", "k": "k", "v": "v", "o": "o", "stats": "stats", "do": "o", "dq": "q", "dk": "k", "dv": "v"}  # whose offsets each has
_lock = threading.Lock()  # a handle has one stream at a time, and backward runs in a thread of its own


class Call(NamedTuple):
    """All that a graph is built for. `strides`: (row, token, head) of q, k, v and, backward, o and do; `documents`: n, 0 for plain rows."""

    backward: bool
    device: torch.device
    dtype: torch.dtype
    sizes: tuple  # B, T, H, K, D
    strides: tuple
    scale: float
    window: int
    documents: int
    deterministic: bool

    def heads(self, name):
        return self.sizes[2] if HEADS.get(name) else self.sizes[3]

    def layout(self, name):
        """(dims, strides) of a tensor as cuDNN has them: (rows or documents, heads, T, D)."""
        B, T, _, _, D = self.sizes
        heads, width = self.heads(name), 1 if name == "stats" else D
        dims = [self.documents or B, heads, T, width]
        if name == "stats":  # token after token in packed rows, head after head in plain ones
            return dims, [heads * T, 1, heads, 1] if self.documents else [heads * T, T, 1, 1]
        if name in ROW[: len(self.strides)] and not self.documents:
            row, token, head = self.strides[ROW.index(name)]
            return dims, [row, head, token, 1]
        return dims, [T * heads * D, D, heads * D, 1]


@functools.cache
def _handle(device):
    import cudnn

    with torch.cuda.device(device) if device.type == "cuda" else torch.device(device):
        return cudnn.create_handle()


def describe(call, handle, **options):
    """cuDNN's graph of `call`, not yet built; `options` go to its constructor."""
    import cudnn

    types = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF", torch.float32: "FLOAT"}
    io, single = getattr(cudnn.data_type, types[call.dtype]), cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=io, intermediate_data_type=single, compute_data_type=single, handle=handle, **options)
    n, (B, T, *_) = call.documents, call.sizes

    def integers(name, count, kind):
        return graph.tensor(dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kind, uid=UID[name], name=name)

    offsets = {name: integers(f"{name} at", n + 1, cudnn.data_type.INT64) for name in ("q", "k", "v", "o", "stats")} if n else {}

    def given(name):
        dims, strides = call.layout(name)
        kind = single if name == "stats" else io
        return graph.tensor(dim=dims, stride=strides, data_type=kind, uid=UID[name], name=name, ragged_offset=offsets.get(PLACED[name]))

    def wanted(name, tensor):
        dims, strides = call.layout(name)
        tensor.set_output(True).set_dim(dims).set_stride(strides).set_uid(UID[name]).set_data_type(single if name == "stats" else io)
        if n:
            tensor.set_ragged_offset(offsets[PLACED[name]])

    # query i sees keys j with i − left < j ≤ i + right ("masks columns at or before row − left bound"): left is the window as it stands
    options = dict(attn_scale=call.scale, diagonal_alignment=cudnn.diagonal_alignment.TOP_LEFT, diagonal_band_right_bound=0)
    if call.window:
        options["diagonal_band_left_bound"] = call.window
    if n:
        lengths = [integers(name, n, cudnn.data_type.INT32) for name in ("length_q", "length_kv")]
        options |= dict(use_padding_mask=True, seq_len_q=lengths[0], seq_len_kv=lengths[1])
    if not call.backward:
        o, stats = graph.sdpa(given("q"), given("k"), given("v"), generate_stats=True, name="attention", **options)
        wanted("o", o), wanted("stats", stats)
        return graph
    if n:
        options |= dict(max_total_seq_len_q=B * T, max_total_seq_len_kv=B * T)  # or the workspace would hold n·T tokens
    inputs = [given(name) for name in ("q", "k", "v", "o", "do", "stats")]
    gradients = graph.sdpa_backward(*inputs, use_deterministic_algorithm=call.deterministic, name="attention_backward", **options)
    for name, tensor in zip(("dq", "dk", "dv"), gradients, strict=True):
        wanted(name, tensor)
    return graph


@functools.cache
def graph_of(call):
    """(graph ready to run, bytes of its workspace). RuntimeError with cuDNN's reason where it knows no kernel for it."""
    import cudnn

    try:
        graph = describe(call, _handle(call.device))
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        return graph, graph.get_workspace_size()
    except Exception as error:
        raise RuntimeError(f"cuDNN {cudnn.backend_version()} cannot run {call}: {error}; use --attn flex_attention or sdpa") from error


def call_of(backward, read, scale, window, borders):
    q, k = read[:2]
    (B, T, H, D), K = q.shape, k.shape[2]
    n = 0 if borders is None else max(FEWEST, 1 << (len(borders) - 2).bit_length())
    strides = () if n else tuple(tuple(t.stride()[:-1]) for t in read)  # packed tokens lie in one way
    deterministic = backward and torch.are_deterministic_algorithms_enabled()
    return Call(backward, q.device, q.dtype, (B, T, H, K, D), strides, scale, window if window < T else 0, n, deterministic)


def run(call, tensors, borders):
    """Launch the graph of `call` on the current stream. `tensors` {name: tensor}; `borders` (documents + 1) or None."""
    import cudnn

    B, T, *_, D = call.sizes
    if call.documents:  # what fills the list up begins at the end and has no tokens; so do none that the last border leaves out
        borders = F.pad(borders[:-1].long(), (0, call.documents + 2 - len(borders)), value=B * T)
        lengths = borders.diff().int()
        tensors = tensors | {"length_q": lengths, "length_kv": lengths}
        units = {name: call.heads(name) * (1 if name == "stats" else D) for name in ("q", "k", "v", "o", "stats")}  # elements a token
        offsets = {unit: borders * unit for unit in set(units.values())}
        tensors |= {f"{name} at": offsets[unit] for name, unit in units.items()}
    cuda = call.device.type == "cuda"
    with torch.cuda.device(call.device) if cuda else torch.device(call.device), _lock:
        graph, size = graph_of(call)
        workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=call.device)
        handle = _handle(call.device)
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(call.device).cuda_stream if cuda else 0)
        graph.execute({UID[name]: tensor.data_ptr() for name, tensor in tensors.items()}, workspace.data_ptr(), handle=handle)
