"""Every kernel of nanochat_hf/kernels/ops against the plain formula of its operation in float64, forward and backward.

A GPU runs the kernels themselves. Without one Triton's interpreter runs them, where triton is installed
(make test-kernels), and cuDNN's graphs run in plain torch. A new file in ops/ is found by itself; a new operation needs
cases, see cases.py.
"""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from nanochat_hf.kernels import FLOAT8
from nanochat_hf.kernels import ops as folder
from nanochat_hf.kernels.lib import cudnn_attention, cudnn_graph
from nanochat_hf.model import NanochatConfig
from nanochat_hf.model.ops_nanochat_hf import PLAIN
from nanochat_hf.optim.gradient_sums import gradient_sums
from tests.kernels.cases import CASES, in_float64
from tests.support import cudnn_stand_in
from tests.support.kernels import DEVICE, HALF, KIND, TOLERANCE, relative

pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # the first product of a thread
NAMES = sorted(path.stem for path in Path(folder.__file__).parent.glob("*.py") if path.stem != "__init__")


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Without a GPU cuDNN's graphs are those of the stand-in, which reads and writes by address and stride."""
    if not HALF:
        cudnn_graph.graph_of.cache_clear(), cudnn_graph.handle_of.cache_clear()
        monkeypatch.setitem(sys.modules, "cudnn", cudnn_stand_in.module())
    yield
    if not HALF:
        cudnn_graph.graph_of.cache_clear(), cudnn_graph.handle_of.cache_clear()


def module_of(name):
    try:
        return import_module(f"{folder.__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] == "triton":
            pytest.skip("triton is not installed: make test-kernels")
        raise


def tensors_of(result):
    return [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, torch.Tensor)]


def leaves_of(case):
    return [*case.tensors, *(layer.weight for layer in case.layers.values())]


def outcome(function, case):
    """(what the call gives, the gradients of its tensors and weights) with random slopes."""
    results, wanted = [*tensors_of(function(*case.args)), *case.in_place], leaves_of(case)
    if wanted:
        generator, joined = torch.Generator().manual_seed(5), [t for t in results if t.requires_grad]
        slopes = [torch.randn(t.shape, generator=generator).to(t) for t in joined]
        torch.autograd.backward(joined, slopes)
    return results, [t.grad for t in wanted]


def alike(ours, formulas, tolerance):
    for a, b in zip(ours, formulas, strict=True):
        if b.count_nonzero() == 0:
            assert a.count_nonzero() == 0
        elif b.numel() <= 2:  # sums over all elements that cancel: the terms' size counts, not the sum's
            torch.testing.assert_close(
                a.double(), b, rtol=tolerance, atol=tolerance * max(t.numel() for t in ours) ** 0.5
            )
        else:
            assert relative(a, b) < tolerance, relative(a, b)


def skip_unless_it_runs(module):
    """Skip a kernel that does not fit the GPU, or without one a kernel that neither interpreter nor CPU can run."""
    if not HALF:
        if not getattr(module, "INTERPRETED", True):
            pytest.skip("torch computes this on CUDA alone")
        return
    config = NanochatConfig(attn_implementation=cudnn_attention.NAME)
    reasons = [module.fits(config, torch.device(DEVICE), dtype) for dtype in (KIND, FLOAT8)]
    if None not in reasons:
        pytest.skip("; ".join(reasons))


@pytest.mark.parametrize("summed", [False, True], ids=["", "into sums"])
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_is_its_formula_forward_and_backward(name, summed):
    module = module_of(name)
    skip_unless_it_runs(module)
    groups = getattr(module, "SUMMED", ())
    if summed and not groups:
        pytest.skip("it adds up no gradients of weights")
    formula, served = getattr(PLAIN, module.OP), 0
    forward, backward = getattr(module, "TOLERANCE", (TOLERANCE, 2 * TOLERANCE))
    for make in CASES[module.OP]:
        case = make()
        exact = in_float64(case)
        with torch.autocast(DEVICE, KIND, enabled=HALF):
            if HALF and not getattr(module, "serves", lambda *args: True)(*case.args):
                continue  # without a GPU nothing that is made for Hopper is served, and all of it runs
            served += 1
            layers = [[case.layers[n] for n in names] for names in groups if summed and names[0] in case.layers]
            with gradient_sums(layers, KIND if HALF else None) as sums:
                assert bool(sums) == bool(layers)
                if sums:
                    sums.refresh()
                ours = outcome(module.run, case)
                alike(ours[0], outcome(formula, exact)[0], forward)
                alike(ours[1], [t.grad for t in leaves_of(exact)], backward)
    assert served, "no case is one that the kernel serves"


def test_every_operation_has_cases_and_every_kernel_an_operation():
    assert set(CASES) == set(vars(PLAIN))
    for name in NAMES:
        source = (Path(folder.__file__).parent / f"{name}.py").read_text()
        assert any(f'OP = "{op}"' in source for op in CASES), name
    assert cudnn_attention.NAME == "cudnn"
