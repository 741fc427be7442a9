"""Products fused with one more operation by cuDNN's graphs (package nvidia-cudnn-frontend). For Hopper.

cuDNN's kernels multiply the next tile while they finish and store the last one; Triton's do not
(docs/records/2026-11-26-one-product-for-qkv).
Letters: N tokens, K inner width, W width of the result.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from .cudnn_attention import missing
from .cudnn_graph import handle_of, held

TILE = 192  # columns of a tile of the kernel that is fastest for widths that 192 divides
UID = {"a": 1, "w": 2, "kept": 3, "result": 4}


def _preferred(width):
    # names of cuDNN 9's kernels, the fastest on an H100 first. The choice is fixed, so that results do not change.
    kernels = ("k24=2", "k24=40", "k24=3") if width % TILE == 0 else ("k24=3", "k24=40", "k24=2")
    return [f"eng4_{kernel}" for kernel in kernels]


@functools.cache
def plan_of(kind: str, device: torch.device, dtype: torch.dtype, N: int, K: int, W: int) -> tuple[Any, int, int] | None:
    """(graph, number of its plan, bytes of workspace), or None without a kernel; a is (N, K), kept and result (N, W).

    kind "slope": (a·w)·2·√kept, w (K, W). kind "sum": a·wᵀ + kept, w (W, K).
    """
    if missing(device):
        return None
    import cudnn

    single = cudnn.data_type.FLOAT
    io = cudnn.data_type.BFLOAT16 if dtype == torch.bfloat16 else cudnn.data_type.HALF
    graph = cudnn.pygraph(
        io_data_type=io, intermediate_data_type=single, compute_data_type=single, handle=handle_of(device)
    )

    def given(name, rows, columns, turned=False):
        strides = [rows * columns, 1, rows] if turned else [rows * columns, columns, 1]
        return graph.tensor(dim=[1, rows, columns], stride=strides, data_type=io, uid=UID[name], name=name)

    product, kept = graph.matmul(given("a", N, K), given("w", K, W, turned=kind == "sum")), given("kept", N, W)
    if kind == "sum":
        result = graph.add(product, kept)
    else:
        root = graph.sqrt(kept)
        result = graph.mul(product, graph.add(root, root))
    result.set_output(True).set_data_type(io).set_uid(UID["result"])
    try:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        names = [graph.get_plan_name_at_index(i) for i in range(graph.get_execution_plan_count())]
        number = next((names.index(name) for name in _preferred(W) if name in names), 0)
        graph.build_plan_at_index(number)
    except Exception:  # an older cuDNN, or a limit of it: the caller has another way
        return None
    return graph, number, graph.get_workspace_size_plan_at_index(number)


def _run(kind, a, w, kept):
    plan = plan_of(kind, a.device, a.dtype, *a.shape, kept.shape[1])
    if plan is None:
        return None
    graph, number, size = plan
    out, workspace = torch.empty_like(kept), torch.empty(max(size, 1), dtype=torch.uint8, device=a.device)
    tensors = {"a": a, "w": w, "kept": kept, "result": out}
    with held(a.device) as handle:
        graph.execute_plan_at_index(
            {UID[name]: t.data_ptr() for name, t in tensors.items()}, workspace.data_ptr(), number, handle=handle
        )
    return out


def slope(dy: Tensor, down: Tensor, squared: Tensor) -> Tensor | None:
    """(dy·down)·2·√squared of contiguous dy (N, C), down (C, W), squared (N, W) → (N, W); None without a kernel."""
    return _run("slope", dy, down, squared)


@torch.library.custom_op("nanochat_hf::product_plus", mutates_args=())
def product_plus(a: torch.Tensor, w: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """a·wᵀ + kept, a (N, K), w (W, K), kept (N, W) → (N, W); summed in float32 where cuDNN has a kernel for it."""
    a, w, kept = a.contiguous(), w.contiguous(), kept.contiguous()
    out = _run("sum", a, w, kept)
    return a @ w.mT + kept if out is None else out


@product_plus.register_fake
def _(a, w, kept):
    return kept.new_empty(kept.shape)


def serves(device: torch.device) -> bool:
    """Whether product_plus is faster than a product and a sum on `device`: on Hopper with cuDNN's frontend."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 and missing(device) is None
