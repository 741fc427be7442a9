"""cuDNN's graphs of causal attention with windows and packed documents (package nvidia-cudnn-frontend).

What cuDNN supports is described in NVIDIA/cudnn-frontend 1.18: docs/operations/Attention.md and the header of its
attention node. Letters: B rows, T positions, H query heads, K key/value heads, D head_dim, n documents, with the empty
ones at the end.
"""

import contextlib
import functools
import threading
from collections.abc import Generator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST = 64  # documents of the smallest graph; larger ones have powers of 2, so that few graphs are built
HEADS = {"q": "H", "o": "H", "do": "H", "dq": "H", "stats": "H"}  # the other tensors have K heads
UID = {
    name: i for i, name in enumerate(("q", "k", "v", "o", "stats", "do", "dq", "dk", "dv", "length_q", "length_kv"), 1)
}
OFFSETS = 32  # the lowest uid of a tensor of offsets
_lock = threading.Lock()  # a handle has one stream at a time, but backward runs in another thread


class Call(NamedTuple):
    """What determines a graph.

    strides: (name, (row, token, head)) of each tensor but stats. documents: 0 where each row is one document.
    """

    backward: bool
    device: torch.device
    dtype: torch.dtype
    sizes: tuple  # B, T, H, K, D
    strides: tuple
    scale: float
    window: int
    documents: int
    deterministic: bool

    def heads(self, name: str) -> int:
        """Heads of a tensor, H or K."""
        return self.sizes[2] if HEADS.get(name) else self.sizes[3]

    def layout(self, name: str) -> tuple[list[int], list[int]]:
        """(dims, strides) of a tensor in cuDNN's order: rows or documents, heads, T, D."""
        B, T, _, _, D = self.sizes
        heads, width = self.heads(name), 1 if name == "stats" else D
        dims = [self.documents or B, heads, T, width]
        if name == "stats":  # (T, H) in memory for packed rows, (H, T) for plain ones
            return dims, [heads * T, 1, heads, 1] if self.documents else [heads * T, T, 1, 1]
        row, token, head = dict(self.strides)[name]
        return dims, [T * token if self.documents else row, head, token, 1]

    def unit(self, name: str) -> int:
        """Elements from one token of packed rows to the next."""
        return self.heads(name) if name == "stats" else dict(self.strides)[name][1]

    def offset_ids(self) -> dict[int, int]:
        """{unit: uid of the documents' offsets for tensors with that unit}; {} for plain rows."""
        units = {self.unit(name) for name in (*dict(self.strides), "stats")} if self.documents else ()
        return {unit: OFFSETS + i for i, unit in enumerate(sorted(units))}


@functools.cache
def handle_of(device: torch.device) -> Any:
    """cuDNN's handle for `device`."""
    import cudnn

    with torch.cuda.device(device) if device.type == "cuda" else torch.device(device):
        return cudnn.create_handle()


@contextlib.contextmanager
def held(device: torch.device) -> Generator[Any, None, None]:
    """The device's handle, set to the current stream, for one thread at a time."""
    import cudnn

    cuda = device.type == "cuda"
    with torch.cuda.device(device) if cuda else torch.device(device), _lock:
        handle = handle_of(device)
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream if cuda else 0)
        yield handle


def describe(call: Call, handle: Any, **options: Any) -> Any:
    """cuDNN's graph of `call`, not built yet; `options` go to its constructor."""
    import cudnn

    types = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF", torch.float32: "FLOAT"}
    io, single = getattr(cudnn.data_type, types[call.dtype]), cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=io, intermediate_data_type=single, compute_data_type=single, handle=handle, **options
    )
    n, (B, T, *_) = call.documents, call.sizes

    def integers(name, uid, count, kind):
        return graph.tensor(dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kind, uid=uid, name=name)

    offsets = {
        unit: integers(f"at {unit}", uid, n + 1, cudnn.data_type.INT64) for unit, uid in call.offset_ids().items()
    }

    def given(name):
        dims, strides = call.layout(name)
        kind, offset = single if name == "stats" else io, offsets.get(call.unit(name))
        return graph.tensor(dim=dims, stride=strides, data_type=kind, uid=UID[name], name=name, ragged_offset=offset)

    def wanted(name, tensor):
        dims, strides = call.layout(name)
        tensor.set_output(True).set_dim(dims).set_stride(strides).set_uid(UID[name]).set_data_type(
            single if name == "stats" else io
        )
        if n:
            tensor.set_ragged_offset(offsets[call.unit(name)])

    # query i sees the keys j with i − left < j ≤ i + right, so `left` is the window
    options: dict[str, Any] = dict(
        attn_scale=call.scale, diagonal_alignment=cudnn.diagonal_alignment.TOP_LEFT, diagonal_band_right_bound=0
    )
    if call.window:
        options["diagonal_band_left_bound"] = call.window
    if n:
        lengths = [integers(name, UID[name], n, cudnn.data_type.INT32) for name in ("length_q", "length_kv")]
        options |= dict(use_padding_mask=True, seq_len_q=lengths[0], seq_len_kv=lengths[1])
    if not call.backward:
        o, stats = graph.sdpa(given("q"), given("k"), given("v"), generate_stats=True, name="attention", **options)
        wanted("o", o), wanted("stats", stats)
        return graph
    if n:
        # otherwise the workspace would be for n·T tokens
        options |= dict(max_total_seq_len_q=B * T, max_total_seq_len_kv=B * T)
    inputs = [given(name) for name in ("q", "k", "v", "o", "do", "stats")]
    gradients = graph.sdpa_backward(
        *inputs, use_deterministic_algorithm=call.deterministic, name="attention_backward", **options
    )
    for name, tensor in zip(("dq", "dk", "dv"), gradients, strict=True):
        wanted(name, tensor)
    return graph


@functools.cache
def graph_of(call: Call) -> tuple[Any, int]:
    """(graph ready to run, bytes of its workspace). RuntimeError with cuDNN's reason where it has no kernel."""
    import cudnn

    try:
        graph = describe(call, handle_of(call.device))
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        return graph, graph.get_workspace_size()
    except Exception as error:
        raise RuntimeError(
            f"cuDNN {cudnn.backend_version()} cannot run {call}: {error}; use --attn flex_attention or sdpa"
        ) from error


def call_of(backward: bool, tensors: dict[str, Tensor], scale: float, window: int, borders: Tensor | None) -> Call:
    """The Call for `tensors`, inputs and outputs: {name: (B, T, heads, D)}, and stats."""
    q, k = tensors["q"], tensors["k"]
    (B, T, H, D), K = q.shape, k.shape[2]
    n = 0 if borders is None else max(FEWEST, 1 << (len(borders) - 2).bit_length())
    # packed rows follow one another without gaps, so the stride of a row is redundant
    strides = tuple(
        (name, (0 if n else t.stride(0), *t.stride()[1:3])) for name, t in tensors.items() if name != "stats"
    )
    deterministic = backward and torch.are_deterministic_algorithms_enabled()
    return Call(
        backward, q.device, q.dtype, (B, T, H, K, D), strides, scale, window if window < T else 0, n, deterministic
    )


def run(backward: bool, tensors: dict[str, Tensor], scale: float, window: int, borders: Tensor | None) -> None:
    """Launch attention or its gradient on the current stream. borders: (documents + 1), or None for plain rows."""
    call = call_of(backward, tensors, scale, window, borders)
    numbered = {UID[name]: tensor for name, tensor in tensors.items()}
    if borders is not None:
        # The graph is built for more documents than there are. The others are empty and begin at the end, and the last
        # real one is taken to reach the end.
        B, T, *_ = call.sizes
        borders = F.pad(borders[:-1].long(), (0, call.documents + 2 - len(borders)), value=B * T)
        numbered |= dict.fromkeys((UID["length_q"], UID["length_kv"]), borders.diff().int())
        numbered |= {uid: borders * unit for unit, uid in call.offset_ids().items()}
    with held(call.device) as handle:
        graph, size = graph_of(call)
        workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=call.device)
        graph.execute({uid: tensor.data_ptr() for uid, tensor in numbered.items()}, workspace.data_ptr(), handle=handle)
