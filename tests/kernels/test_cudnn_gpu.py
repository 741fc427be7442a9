"""cuDNN's attention on a GPU: against the formula, and in the model against eager."""

import pytest
import torch

from nanochat_hf.kernels.lib import cudnn_attention
from tests.support.cudnn import both, eager, inputs, learned, model_of
from tests.support.kernels import relative
from tests.support.models import tokens

MISSING = cudnn_attention.missing(torch.device("cuda")) if torch.cuda.is_available() else ("no CUDA device",)
gpu = pytest.mark.skipif(MISSING is not None, reason=f"cuDNN's attention does not run here: {MISSING and MISSING[0]}")
LISTS = {"rows": None, "few": [0, 1, 130, 384, 400, 767, 768], "as many as a graph has": [*range(0, 756, 12), 757, 768]}


@gpu
@pytest.mark.parametrize("listed", LISTS)
@pytest.mark.parametrize("window", [0, 100, 256])
@pytest.mark.parametrize("heads", [(6, 6), (6, 2)])
@pytest.mark.parametrize("dtype, width", [(torch.bfloat16, 128), (torch.float16, 64), (torch.bfloat16, 40)], ids=str)
def test_on_the_gpu_the_operator_is_the_formula(listed, window, heads, dtype, width):
    q, k, v, do, borders = inputs(2, 384, *heads, width, "cuda", dtype, LISTS[listed])
    names, strayed = ("out", "dq", "dk", "dv"), {}
    for name, (ours, wanted) in zip(names, both(q, k, v, do, borders, window), strict=True):
        strayed[name] = relative(ours, wanted)
    assert max(strayed.values()) < 1e-2, strayed


@gpu
def test_on_the_gpu_a_long_window_and_views_in_their_places():
    q, k, v, do, _ = inputs(2, 2048, 6, 6, 128, "cuda", torch.bfloat16)
    joined = torch.cat((q, k, v), 2).split(6, 2)
    for ours, wanted in both(*joined, do, None, 1024):
        assert relative(ours, wanted) < 1e-2


@gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_on_the_gpu_the_model_strays_no_further_from_float32_than_eager(packed, compile):
    sizes = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    ids, places = tokens(2, 256).cuda(), torch.arange(256)
    more = dict(position_ids=torch.stack((places, places % 100)).cuda()) if packed else {}
    _, exact = learned(eager(**sizes).cuda(), ids, **more)
    with torch.autocast("cuda", torch.bfloat16):
        _, plain_ones = learned(eager(**sizes).cuda(), ids, **more)
        model = model_of(**sizes).cuda()
        _, ours = learned(model, ids, torch.compile(model.train(), dynamic=False) if compile else None, **more)
    for (name, parameter), gradient, other, wanted in zip(
        model.named_parameters(), ours, plain_ones, exact, strict=True
    ):
        if parameter.ndim == 2:
            assert relative(gradient, wanted) < 1.5 * relative(other, wanted) + 5e-3, name
