"""The product with the slope of the squared ReLU inside, by one of cuDNN's graphs (package nvidia-cudnn-frontend): its kernels multiply the next tile
while the last one is scaled and stored, which Triton's do not.

Letters: N tokens, C hidden_size, W = 4C intermediate_size.
"""

import functools

import torch

from .cudnn_attention import missing
from .cudnn_graph import handle_of, held

TILE = 192  # columns of a tile of the kernel that serves widths best which it divides
UID = {"dy": 1, "down": 2, "squared": 3, "slope": 4}


def _preferred(width):
    # how cuDNN 9 names kernels, the fastest first as measured on an H100 (docs/log.md); one and the same each time, since results must be too
    kernels = ("k24=2", "k24=40", "k24=3") if width % TILE == 0 else ("k24=3", "k24=40", "k24=2")
    return [f"eng4_{kernel}" for kernel in kernels]


@functools.cache
def plan_of(device, dtype, N, C, W):
    """(graph, its plan's number, bytes of workspace) of (dy (N, C) · down (C, W)) · 2·√squared (N, W); None where cuDNN has none."""
    if missing(device):
        return None
    import cudnn

    single = cudnn.data_type.FLOAT
    io = cudnn.data_type.BFLOAT16 if dtype == torch.bfloat16 else cudnn.data_type.HALF
    graph = cudnn.pygraph(io_data_type=io, intermediate_data_type=single, compute_data_type=single, handle=handle_of(device))

    def given(name, rows, columns):
        return graph.tensor(dim=[1, rows, columns], stride=[rows * columns, columns, 1], data_type=io, uid=UID[name], name=name)

    product = graph.matmul(given("dy", N, C), given("down", C, W))
    root = graph.sqrt(given("squared", N, W))
    slope = graph.mul(product, graph.add(root, root))
    slope.set_output(True).set_data_type(io).set_uid(UID["slope"])
    try:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        names = [graph.get_plan_name_at_index(i) for i in range(graph.get_execution_plan_count())]
        number = next((names.index(name) for name in _preferred(W) if name in names), 0)
        graph.build_plan_at_index(number)
    except Exception:  # an older cuDNN, other limits: Triton's kernel stands ready
        return None
    return graph, number, graph.get_workspace_size_plan_at_index(number)


def slope(dy, down, squared):
    """(dy·down)·2·√squared of dy (N, C), down (C, W) and squared (N, W), all contiguous → (N, W); None where cuDNN has no kernel for it."""
    plan = plan_of(dy.device, dy.dtype, *dy.shape, down.shape[1])
    if plan is None:
        return None
    graph, number, size = plan
    out, workspace = torch.empty_like(squared), torch.empty(max(size, 1), dtype=torch.uint8, device=dy.device)
    tensors = {"dy": dy, "down": down, "squared": squared, "slope": out}
    with held(dy.device) as handle:
        graph.execute_plan_at_index({UID[name]: t.data_ptr() for name, t in tensors.items()}, workspace.data_ptr(), number, handle=handle)
    return out
