"""cuDNN's graphs of attention in plain torch on the CPU.

It is a module `cudnn` with what nvidia-cudnn-frontend 1.18 documents, run from addresses.

Letters: n sequences of at most T tokens, H query heads, K key/value heads, D head_dim. A tensor lies in dims
(n, heads, T, D) with strides in elements. In one with ragged offsets (n + 1), sequence b begins at element offset[b],
and the stride of n is unused.
"""

import ctypes
from types import SimpleNamespace

import torch

SINGLE, DOUBLE, INT = torch.float32, torch.int64, torch.int32
TYPES = SimpleNamespace(FLOAT=SINGLE, HALF=torch.float16, BFLOAT16=torch.bfloat16, INT32=INT, INT64=DOUBLE)
BAND = dict(
    attn_scale=None,
    use_padding_mask=False,
    seq_len_q=None,
    seq_len_kv=None,
    diagonal_alignment="TOP_LEFT",
    diagonal_band_left_bound=None,
    diagonal_band_right_bound=None,
    name="",
)


class Tensor:
    """A tensor's description; the setters are those of the package."""

    def __init__(self, dim=None, stride=None, data_type=None, uid=None, name="", ragged_offset=None):
        self.dim, self.stride, self.type, self.uid, self.offset = dim, stride, data_type, uid, ragged_offset

    def _set(self, **values):
        vars(self).update(values)
        return self

    def set_output(self, _):
        return self

    def set_dim(self, dim):
        return self._set(dim=dim)

    def set_stride(self, stride):
        return self._set(stride=stride)

    def set_uid(self, uid):
        return self._set(uid=uid)

    def set_data_type(self, kind):
        return self._set(type=kind)

    def set_ragged_offset(self, offset):
        return self._set(offset=offset)


def memory(address, dims, strides, kind):
    """The tensor that lies at an address."""
    count = 1 + sum((size - 1) * stride for size, stride in zip(dims, strides, strict=True))
    buffer = (ctypes.c_byte * (count * kind.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=kind, count=count).as_strided(dims, strides)


def sequence(tensor, pack, b, length):
    """Sequence b of a described tensor: (heads, length, D), a view of its memory."""
    assert tensor.stride[3] == 1 and len(tensor.dim) == len(tensor.stride) == 4
    assert length <= tensor.dim[2], "longer than the graph was told"
    begin = b * tensor.stride[0] if tensor.offset is None else int(integers(tensor.offset, pack)[b])
    return memory(
        pack[tensor.uid] + begin * tensor.type.itemsize,
        (tensor.dim[1], length, tensor.dim[3]),
        tensor.stride[1:],
        tensor.type,
    )


def integers(tensor, pack):
    assert tensor.type in (INT, DOUBLE) and tensor.dim[1:] == tensor.stride[1:] == [1, 1, 1]
    return memory(pack[tensor.uid], tensor.dim[:1], [1], tensor.type)


class Graph:
    """`pygraph`, of one attention or its gradient."""

    built, runs = 0, []

    def __init__(self, io_data_type, intermediate_data_type, compute_data_type, handle):
        assert intermediate_data_type == compute_data_type == SINGLE and handle == "handle"

    def tensor(self, **description):
        return Tensor(**description)

    def sdpa(self, q, k, v, generate_stats, **band):
        self.inputs, self.outputs, self.band, self.backward = (q, k, v), (Tensor(), Tensor()), BAND | band, False
        assert generate_stats and band.keys() <= BAND.keys()
        return self.outputs

    def sdpa_backward(
        self,
        q,
        k,
        v,
        o,
        dO,
        stats,
        use_deterministic_algorithm=False,
        max_total_seq_len_q=None,
        max_total_seq_len_kv=None,
        **band,
    ):
        self.inputs, self.outputs, self.band, self.backward = (
            (q, k, v, o, dO, stats),
            (Tensor(), Tensor(), Tensor()),
            BAND | band,
            True,
        )
        assert band.keys() <= BAND.keys()
        return self.outputs

    def build(self, modes):
        assert modes == ["A", "FALLBACK"]
        tensors = (*self.inputs, *self.outputs)
        assert len({t.uid for t in tensors}) == len(tensors) and all(t.type and t.dim and t.stride for t in tensors)
        assert (
            self.band["use_padding_mask"] == (self.inputs[0].offset is not None) == (self.outputs[0].offset is not None)
        )
        assert len({t.dim[0] for t in tensors}) == 1 and self.band["diagonal_alignment"] == "TOP_LEFT"
        Graph.built += 1

    def get_workspace_size(self):
        return 16

    def execute(self, pack, workspace, handle):
        assert handle == "handle" and workspace
        Graph.runs.append(self)
        used = [*self.inputs, *self.outputs]
        used += [t.offset for t in used if t.offset is not None] + [
            t for t in (self.band["seq_len_q"], self.band["seq_len_kv"]) if t is not None
        ]
        assert {t.uid for t in used} == pack.keys()  # no pointer is missing, none without a tensor
        n, _, T, _ = self.inputs[0].dim
        queries, keys = (
            [T] * n if self.band[name] is None else integers(self.band[name], pack).tolist()
            for name in ("seq_len_q", "seq_len_kv")
        )
        for b in range(n):
            if queries[b]:
                assert queries[b] == keys[b]
                read = [sequence(t, pack, b, queries[b]) for t in self.inputs]
                for tensor, result in zip(self.outputs, self.compute(*read), strict=True):
                    sequence(tensor, pack, b, queries[b]).copy_(result)

    def compute(self, q, k, v, o=None, do=None, stats=None):
        """One sequence: forward (o, stats), or (dq, dk, dv) by the given o and stats.

        Columns at or before row − left, and those after row + right, are masked.
        """
        q, k, v = q.float(), k.float(), v.float()
        groups, scale = len(q) // len(k), self.band["attn_scale"]
        k, v = (t.repeat_interleave(groups, dim=0) for t in (k, v))
        row, column = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])
        masked = column > row + self.band["diagonal_band_right_bound"]
        if self.band["diagonal_band_left_bound"] is not None:
            masked |= column <= row - self.band["diagonal_band_left_bound"]
        scores = (q @ k.mT * scale).masked_fill(masked, -torch.inf)
        if not self.backward:
            return scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True)
        o, do = o.float(), do.float()
        weights = (scores - stats).exp()
        slope = weights * (do @ v.mT - (o * do).sum(-1, keepdim=True)) * scale
        return slope @ k, *((t.unflatten(0, (-1, groups)).sum(1)) for t in (slope.mT @ q, weights.mT @ do))


def module():
    """The module to stand at sys.modules["cudnn"]."""
    Graph.built, Graph.runs = 0, []
    return SimpleNamespace(
        pygraph=Graph,
        data_type=TYPES,
        heur_mode=SimpleNamespace(A="A", FALLBACK="FALLBACK"),
        create_handle=lambda: "handle",
        diagonal_alignment=SimpleNamespace(TOP_LEFT="TOP_LEFT"),
        set_stream=lambda handle, stream: None,
        backend_version=lambda: 91900,
    )
