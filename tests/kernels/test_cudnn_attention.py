"""cuDNN's attention against eager, on the CPU, with its graphs in plain torch. test_cudnn_gpu.py runs the kernels."""

import sys
from importlib.util import find_spec
from itertools import repeat

import pytest
import torch
from accelerate import Accelerator
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache

from nanochat_hf.kernels.lib import cudnn_attention, cudnn_graph
from nanochat_hf.machine import attention
from nanochat_hf.training.trainer import Trainer
from tests.support import cudnn_stand_in
from tests.support.cudnn import both, eager, inputs, learned, model_of, plain, same
from tests.support.models import tokens

LENGTH = 30  # windows are 9 keys
PACKED = torch.tensor([[*range(11), *range(19)], [*range(5), *range(20), *range(5)]])


@pytest.fixture
def graphs(monkeypatch):
    """The stand-in for cuDNN, also for float32 on the CPU."""
    monkeypatch.setitem(sys.modules, "cudnn", cudnn_stand_in.module())
    monkeypatch.setattr(cudnn_attention, "runs", lambda q, k, v: q.shape[1] == k.shape[1] > 1)
    cudnn_graph.graph_of.cache_clear(), cudnn_graph.handle_of.cache_clear()
    yield cudnn_stand_in.Graph
    cudnn_graph.graph_of.cache_clear(), cudnn_graph.handle_of.cache_clear()


# One layer with a window and one without: a graph is compiled in half the time of four layers.
SHORT = dict(num_hidden_layers=2, window_pattern="SL")


@pytest.mark.parametrize(
    "changes", [{}, dict(num_key_value_heads=1), dict(num_key_value_heads=4), dict(window_pattern="L")], ids=str
)
def test_plain_rows_windows_and_shared_heads(graphs, changes):
    ids = tokens(2, LENGTH)
    for ours, theirs in zip(learned(model_of(**changes), ids), learned(eager(**changes), ids), strict=True):
        same(ours, theirs)
    assert len(graphs.runs) == 4 + 4 + 4  # layers: evaluation, training, backward
    windows = [run.band["diagonal_band_left_bound"] for run in graphs.runs[:4]]
    assert (
        windows == [None if changes.get("window_pattern") else 9] * 3 + [None] and model_of().config.sliding_window == 9
    )
    assert graphs.built == (
        3 if changes.get("window_pattern") else 6
    )  # evaluation's keys come through a cache, which lays them out anew


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_documents_are_apart(graphs, rows, checkpointing):
    ids, positions = tokens(2, LENGTH)[:rows], PACKED[:rows]
    model = model_of()
    if checkpointing:
        model.gradient_checkpointing_enable()
    logits, gradients = learned(model, ids, position_ids=positions)
    expected, wanted = learned(eager(), ids, position_ids=positions)
    same(logits, expected), same(gradients, wanted)
    assert {run.inputs[0].dim[0] for run in graphs.runs} == {64}
    changed = ids.clone()
    changed[0, :11] = (changed[0, :11] + 1) % 100
    after = model.eval()(changed, position_ids=positions).logits
    assert (
        torch.equal(after[0, 11:], logits[0, 11:])
        and torch.equal(after[1:], logits[1:])
        and not torch.equal(after[0, :11], logits[0, :11])
    )


@pytest.mark.parametrize("borders", [None, [0, 3, 13, 26], [0, 1, 2, 13, 14, 26]], ids=str)
@pytest.mark.parametrize("window", [0, 1, 4, 13, 40])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
def test_the_operator_is_the_formula_and_writes_all_of_its_outputs(graphs, borders, window, heads):
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        for ours, wanted in both(*inputs(2, 13, *heads, 8, borders=borders), window):
            same(ours, wanted)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("borders", [None, [0, 3, 13, 26]], ids=str)
@pytest.mark.parametrize("layout", ["heads first", "one product", "odd", "expanded slope", "half a vector off"])
def test_tensors_are_read_where_they_lie(graphs, borders, layout):
    q, k, v, do, borders = inputs(2, 13, 4, 4, 8, borders=borders)
    if layout == "heads first":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    elif layout == "one product":
        q, k, v = torch.cat((q, k, v), 2).split(4, 2)
    elif layout == "odd":
        q, k, v = (torch.cat((t, t[..., :1]), -1)[..., :8] for t in (q, k, v))
    elif layout == "half a vector off":
        q = torch.cat((q.flatten()[:2], q.flatten()))[2:].view(q.shape)
    else:
        do = torch.ones(1, 1, 1, 1).expand(do.shape)
    tensors = [t.detach().requires_grad_() for t in (q, k, v)]  # views as they are
    out, _ = torch.ops.nanochat_hf.cudnn_attention(*tensors, borders, 8**-0.5, 5)
    wanted = plain(*tensors, cudnn_attention.packed_mask((2, 13), borders, 5, q.device))
    same(out, wanted)
    same(torch.autograd.grad(out, tensors, do), torch.autograd.grad(wanted, tensors, do))
    if borders is None and layout != "odd" and layout != "half a vector off":
        row, token, head, last = q.stride()
        assert graphs.runs[0].inputs[0].stride == [row, head, token, last]


@pytest.mark.parametrize("borders", [None, [0, 3, 13, 26]], ids=str)
def test_opcheck(graphs, borders):
    q, k, v, do, borders = inputs(2, 13, 4, 2, 8, borders=borders)
    tensors = [t.requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(torch.ops.nanochat_hf.cudnn_attention, (*tensors, borders, 0.3, 4))
    out, stats = torch.ops.nanochat_hf.cudnn_attention(*(t.detach() for t in tensors), borders, 0.3, 4)
    arguments = do, *(t.detach() for t in tensors), out, stats, borders, 0.3, 4
    torch.library.opcheck(
        torch.ops.nanochat_hf.cudnn_attention_backward, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_plain_rows_compile_as_one_graph(graphs):
    ids = tokens(2, LENGTH)
    model = model_of(**SHORT)
    call = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    model.train()
    for ours, wanted in zip(learned(model, ids, call)[1], learned(eager(**SHORT), ids)[1], strict=True):
        same(ours, wanted)


def test_packed_rows_compile_once_for_any_number_of_documents(graphs):
    model, ids, counter = model_of(**SHORT), tokens(1, LENGTH), CompileCounterWithBackend("aot_eager")
    call, frames = torch.compile(model.train(), dynamic=False, backend=counter), []
    for documents in (1, 2, 3, 7, 20):
        positions = torch.cat([torch.arange(LENGTH + 1 - documents), torch.zeros(documents - 1, dtype=torch.long)])[
            None
        ]
        gradients = learned(model, ids, call, position_ids=positions)[1]
        same(gradients, learned(eager(**SHORT), ids, position_ids=positions)[1])
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]


@pytest.mark.parametrize("rows", [1, 2])
def test_packed_rows_whose_borders_come_along_compile_as_one_graph(graphs, rows):
    model, ids, counter = model_of(**SHORT), tokens(rows, LENGTH), CompileCounterWithBackend("aot_eager")
    call = torch.compile(model.train(), dynamic=False, fullgraph=True, backend=counter)
    for documents in (1, 2, 3, 7, 20):
        positions = torch.cat(
            [torch.arange(LENGTH + 1 - documents), torch.zeros(documents - 1, dtype=torch.long)]
        ).expand(rows, -1)
        borders = model.model.document_borders(positions, ids.device)
        wanted = learned(eager(**SHORT), ids, position_ids=positions)[1]
        same(
            torch.autograd.grad(
                call(ids, labels=ids, position_ids=positions, **borders).loss, list(model.parameters())
            ),
            wanted,
        )
    assert counter.frame_count == 1
    assert eager().model.document_borders(positions, ids.device) == {} == model.model.document_borders(None, ids.device)


def test_the_trainer_brings_the_borders(graphs):
    """While positions lie on the host: fullgraph would refuse the search for them inside."""
    positions = torch.cat([torch.arange(n) for n in (3, 10, LENGTH - 13)]).expand(2, -1)
    ids = tokens(2, LENGTH)
    batch = {"input_ids": ids, "shift_labels": ids.roll(-1, 1), "position_ids": positions}
    losses = []
    for model in (eager(**SHORT), model_of(**SHORT)):
        trainer = Trainer(
            Accelerator(cpu=True),
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            repeat(batch),
            num_steps=3,
            schedule=lambda optimizer, step: 1.0,
            callbacks=[lambda trainer, info: losses.append(info.loss)],
        )
        if model.config._attn_implementation == "cudnn":
            trainer.model = torch.compile(trainer.model, fullgraph=True, dynamic=False, backend="aot_eager")
        trainer.fit()
    same(losses[3:], losses[:3])
    assert losses[2] < losses[0]


def test_few_graphs_serve_any_number_of_documents(graphs):
    q, k, v, _, _ = inputs(1, 200, 1, 1, 8)
    for documents, built in ((1, 1), (2, 1), (64, 1), (65, 2), (128, 2), (129, 3), (200, 3)):
        borders = torch.tensor([*range(documents), 200], dtype=torch.int32)
        out, _ = torch.ops.nanochat_hf.cudnn_attention(q, k, v, borders, 1.0, 0)
        assert graphs.built == built and torch.equal(out[0, : documents - 1], v[0, : documents - 1])
    torch.ops.nanochat_hf.cudnn_attention(q, k, v, None, 1.0, 0)
    torch.ops.nanochat_hf.cudnn_attention(q, k, v, None, 1.0, 200)  # a window as long as the row is none
    assert graphs.built == 4


def test_what_cudnn_refuses_is_an_error_with_its_reason(graphs, monkeypatch):
    def refuse(self, modes):
        raise RuntimeError("No valid engine configs")

    monkeypatch.setattr(graphs, "build", refuse)
    with pytest.raises(
        RuntimeError, match="cuDNN 91900 cannot run .*No valid engine configs; use --attn flex_attention or sdpa"
    ):
        torch.ops.nanochat_hf.cudnn_attention(*inputs(1, 4, 1, 1, 8)[:3], None, 1.0, 0)


@pytest.mark.parametrize("stand_in", [False, True])
@pytest.mark.parametrize("given", ["left", "right", "ones", "cache", "positions", "borders"])
@pytest.mark.parametrize("rows", [1, 2])
def test_masks_caches_and_what_the_kernels_do_not_know_are_eagers(stand_in, given, rows, request):
    if stand_in:
        request.getfixturevalue("graphs")
    ids, place, model = tokens(2, LENGTH)[:rows], torch.arange(LENGTH), model_of()
    lengths, outputs = torch.tensor([8, LENGTH])[:rows, None], []
    mask = {"left": place >= LENGTH - lengths, "right": place < lengths}.get(
        given, torch.ones(rows, LENGTH).bool()
    ).long()
    for each in (model, eager()):
        more = dict(attention_mask=mask) if given in ("left", "right", "ones") else {}
        if given in ("ones", "cache", "positions"):  # documents are apart in the last alone
            more["position_ids"] = PACKED[:rows]
        if given == "cache":
            more["past_key_values"] = DynamicCache(config=each.config)
        if given == "borders":
            borders = torch.tensor([0, 11, 30, 35, 55, 60][: 3 * rows], dtype=torch.int32)
            more = dict(position_ids=PACKED[:rows]) | (
                dict(cu_seq_lens_q=borders, cu_seq_lens_k=borders) if each is model else {}
            )
        outputs.append(each(ids, **more).logits[mask.bool()])
    same(*outputs)


@pytest.mark.parametrize("stand_in", [False, True])
@pytest.mark.parametrize("options", [{}, dict(cache_implementation="static", disable_compile=True)], ids=str)
def test_generation_past_the_window(stand_in, options, request):
    if stand_in:
        request.getfixturevalue("graphs")
    ids = tokens(3, LENGTH)
    for mask in (torch.ones_like(ids), (torch.arange(LENGTH) >= torch.tensor([[0], [9], [20]])).long()):
        asked = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=3)
        assert torch.equal(model_of().generate(ids, **asked, **options), eager().generate(ids, **asked))


def test_the_kernels_take_half_precision_on_cuda_alone():
    q = torch.empty(1, 128, 2, 64, dtype=torch.bfloat16)
    assert not cudnn_attention.runs(q, q, q)

    def fits(T=128, S=None, D=64, dtype=torch.bfloat16):
        shapes = (1, T, 2, D), (1, S or T, 2, D)
        q, k = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
        q, k = (type("Fake", (), dict(shape=t.shape, dtype=t.dtype, device=torch.device("cuda")))() for t in (q, k))
        return cudnn_attention.runs(q, k, k)

    assert fits() and fits(dtype=torch.float16) and fits(T=100) and fits(D=128)
    assert not any((fits(dtype=torch.float32), fits(D=20), fits(D=136), fits(T=1), fits(T=1, S=9), fits(S=256)))
    with torch.no_grad():
        assert fits() and not fits(T=100)


@pytest.mark.parametrize(
    "device, installed, major, precision, message",
    [
        ("cpu", True, 9, "bf16", "cudnn cannot run on cpu: its kernels need a CUDA device; use sdpa or auto"),
        (
            "cuda",
            False,
            9,
            "bf16",
            "nvidia-cudnn-frontend is not installed; pip install nvidia-cudnn-frontend, or use sdpa or auto",
        ),
        ("cuda", True, 8, "bf16", "the GPU is older than Hopper; use sdpa or auto"),
        ("cuda", True, 9, "no", "it computes in half precision and this run in float32; add --dtype bfloat16"),
        ("cuda", True, 9, "bf16", None),
        ("cuda", True, 10, None, None),
    ],
)
def test_where_it_cannot_run_the_flag_says_why_and_auto_takes_another(
    monkeypatch, device, installed, major, precision, message
):
    monkeypatch.setitem(sys.modules, "cudnn", cudnn_stand_in.module())
    real = find_spec

    def found(name):
        if name == "cudnn":
            return object() if installed else None
        return object() if name == "triton" else real(name)

    monkeypatch.setattr(cudnn_attention, "find_spec", found), monkeypatch.setattr(attention, "find_spec", found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
    device = torch.device(device)
    if message is None:
        assert attention.choose_attention(device, "cudnn", precision=precision, cudnn=cudnn_attention) == (
            "cudnn",
            "asked for",
        )
    else:
        with pytest.raises(ValueError, match=message):
            attention.choose_attention(device, "cudnn", precision=precision, cudnn=cudnn_attention)
    expected = "sdpa" if device.type == "cpu" else "cudnn" if message is None and major == 9 else "flex_attention"
    assert attention.choose_attention(device, precision=precision, cudnn=cudnn_attention)[0] == expected


def test_a_package_that_cannot_be_imported_is_one_error(monkeypatch):
    broken = cudnn_stand_in.module()
    monkeypatch.setattr(cudnn_attention, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for version, message in ((90500, "cuDNN 90500 is older than 90600"), (None, "cannot be imported .TypeError")):
        broken.backend_version = (lambda version=version: version) if version else (lambda needed: None)
        monkeypatch.setitem(sys.modules, "cudnn", broken)
        with pytest.raises(ValueError, match=message):
            attention.choose_attention(torch.device("cuda"), "cudnn", cudnn=cudnn_attention)
