"""The model under every name of transformers' flash family against eager attention.

Without a GPU, tests/support/flash.py stands in for the kernels.
"""

from functools import cache
from importlib import import_module, util
from inspect import signature

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache
from transformers.integrations import flash_attention

from nanochat_hf.machine import attention
from nanochat_hf.model.masks_nanochat_hf import varlen_arguments
from tests.support import flash
from tests.support.models import build, tokens

LENGTH, WINDOW = 30, 9  # positions, and keys of a window
PACKED = torch.tensor([[*range(11), *range(19)], [*range(5), *range(20), *range(5)]])


@pytest.fixture(params=flash.NAMES)
def name(request):
    return request.param


def flashing(monkeypatch, name, **changes):
    """(model, the stand-in's functions) under an implementation of the family, set as a user would."""
    functions, model = flash.install(monkeypatch, name), build(**changes)
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == name
    return model, functions


def eager(**changes):
    return build(attn_implementation="eager", **changes)


@cache
def said_by_eager(rows):
    """What eager attention generates for the last `rows` of the left-padded prompts."""
    return eager().generate(tokens(3, LENGTH)[-rows:], **asked(rows))


def asked(rows):
    """Settings of that generation: past the 9 keys of a window, and round its cache."""
    return dict(
        attention_mask=padding("left")[-rows:],
        max_new_tokens=WINDOW + 3,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=3,
    )


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def learned(model, ids, **inputs):
    """Logits, and the gradients of a loss."""
    logits = model(ids, **inputs).logits
    loss = model.train()(ids, labels=ids, **inputs).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return logits, dict(zip(dict(model.named_parameters()), gradients, strict=True))


def padding(side):
    lengths, place = torch.tensor([LENGTH, 8, 21])[:, None], torch.arange(LENGTH)
    return (place >= LENGTH - lengths if side == "left" else place < lengths).long()


def test_the_stand_in_aligns_and_counts_as_flash_attn_documents():
    def seen(queries, keys, **options):
        values = torch.eye(keys)[:, None]  # so that the output is the row of weights
        return flash.attention(torch.zeros(queries, 1, keys), values, values, **options)[:, 0].gt(0).int().tolist()

    assert seen(2, 5, causal=True) == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert seen(5, 2, causal=True) == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]
    assert seen(2, 5, causal=True, window_size=(2, 2)) == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert seen(2, 5, window_size=(1, 1)) == [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert seen(1, 3, window_size=(None, None)) == seen(1, 3) == [[1, 1, 1]]


@pytest.mark.parametrize("version, module", [(2, "flash_attn"), (3, "flash_attn_interface"), (4, "flash_attn.cute")])
def test_the_stand_in_takes_the_parameters_of_the_package_where_it_is_installed(version, module):
    if util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"{module} is not installed")
    package, stand_in = import_module(module), flash.FlashAttention(version)
    for function in ("flash_attn_func", "flash_attn_varlen_func"):
        assert [*signature(getattr(package, function)).parameters] == [
            *signature(getattr(stand_in, function)).parameters
        ]


@pytest.mark.parametrize(
    "changes", [{}, dict(num_key_value_heads=1), dict(num_key_value_heads=4), dict(window_pattern="L")], ids=str
)
def test_plain_rows_windows_and_shared_heads(monkeypatch, name, changes):
    ids = tokens(2, LENGTH)
    model, functions = flashing(monkeypatch, name, **changes)
    logits, gradients = learned(model, ids)
    expected, wanted = learned(eager(**changes), ids)
    same(logits, expected)
    for parameter, gradient in gradients.items():
        same(gradient, wanted[parameter])
    assert [function for function, _ in functions.calls] == ["flash_attn_func"] * 8
    windows = [call.get("window_size") for _, call in functions.calls[:4]]
    assert windows == [None if changes.get("window_pattern") else (8, 8)] * 3 + [None]
    assert not flash_attention._use_top_left_mask


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_documents_are_apart(monkeypatch, name, rows, checkpointing):
    ids, positions = tokens(2, LENGTH)[:rows], PACKED[:rows]
    model, functions = flashing(monkeypatch, name)
    if checkpointing:
        model.gradient_checkpointing_enable()
    logits, gradients = learned(model, ids, position_ids=positions)
    expected, wanted = learned(eager(), ids, position_ids=positions)
    same(logits, expected)
    for parameter, gradient in gradients.items():
        same(gradient, wanted[parameter])
    borders = [call["cu_seqlens_q"] for _, call in functions.calls[:4]]
    assert borders[0].tolist() == [0, 11, 30, 35, 55, 60][: 3 * rows] and all(
        each is borders[0] for each in borders
    )  # made once a forward
    changed = ids.clone()
    changed[0, :11] = (changed[0, :11] + 1) % 100
    after = model.eval()(changed, position_ids=positions).logits
    assert (
        torch.equal(after[0, 11:], logits[0, 11:])
        and torch.equal(after[1:], logits[1:])
        and not torch.equal(after[0, :11], logits[0, :11])
    )


def test_each_document_is_as_if_alone(monkeypatch, name):
    ids = tokens(2, LENGTH)
    model, _ = flashing(monkeypatch, name)
    logits = model(ids, position_ids=PACKED).logits
    for row, start, end in ((0, 0, 11), (0, 11, 30), (1, 0, 5), (1, 5, 25), (1, 25, 30)):
        same(logits[row, start:end], model(ids[row : row + 1, start:end]).logits[0])


@pytest.mark.parametrize("given", ["mask", "cache"])
@pytest.mark.parametrize("rows", [1, 2])
def test_positions_that_restart_isolate_only_without_mask_and_cache(monkeypatch, name, given, rows):
    """As eager has it; transformers would keep the documents of a single row apart all the same."""
    ids, positions = tokens(2, LENGTH)[:rows], PACKED[:rows]
    model, _ = flashing(monkeypatch, name)
    outputs = []
    for each in (model, eager()):
        more = (
            dict(attention_mask=torch.ones_like(ids))
            if given == "mask"
            else dict(past_key_values=DynamicCache(config=each.config))
        )
        outputs.append(each(ids, position_ids=positions, **more).logits)
    same(*outputs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(monkeypatch, name, side):
    ids, mask = tokens(3, LENGTH), padding(side)
    model, _ = flashing(monkeypatch, name)
    same(model(ids, attention_mask=mask).logits[mask.bool()], eager()(ids, attention_mask=mask).logits[mask.bool()])


@pytest.mark.parametrize(
    "options", [{}, dict(prefill_chunk_size=7), dict(cache_implementation="static", disable_compile=True)], ids=str
)
@pytest.mark.parametrize("rows", [1, 3])
def test_generation_from_left_padded_prompts_past_the_window(monkeypatch, name, rows, options):
    ids, mask = tokens(3, LENGTH)[-rows:], padding("left")[-rows:]
    model, functions = flashing(monkeypatch, name)
    said = model.generate(ids, **asked(rows), **options)
    assert torch.equal(said, said_by_eager(rows)) and functions.calls
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = ids[row : row + 1, LENGTH - length :]
        assert torch.equal(
            model.generate(alone, **asked(rows) | dict(attention_mask=torch.ones_like(alone)))[0, length:],
            said[row, LENGTH:],
        )


@pytest.mark.parametrize(
    "sizes", [[1] * LENGTH, [12, *[1] * 18], [7, 7, 7, 9], [20, 10]], ids=["each", "decode", "chunks", "two"]
)
@pytest.mark.parametrize("rows", [1, 2])
def test_cached_is_uncached_past_the_window(monkeypatch, name, rows, sizes):
    ids = tokens(2, LENGTH)[:rows]
    model, _ = flashing(monkeypatch, name)
    cache, positions = DynamicCache(config=model.config), torch.arange(LENGTH).expand(rows, -1).split(sizes, 1)
    pieces = [
        model(part, position_ids=at, past_key_values=cache).logits
        for part, at in zip(ids.split(sizes, 1), positions, strict=True)
    ]
    same(torch.cat(pieces, 1), eager()(ids).logits)
    assert {layer.keys.shape[2] for layer in cache.layers[:3]} == {8} and cache.layers[3].keys.shape[2] == LENGTH


def test_other_numbers_of_documents_compile_nothing_anew():
    """The whole model with real kernels, as operators: what reads the borders of documents is compiled once."""
    counter = CompileCounter()
    borders = torch.compile(
        lambda positions: varlen_arguments(positions, 1)["cu_seq_lens_q"] * 2, backend=counter, dynamic=False
    )
    for documents in range(1, 12):
        positions = torch.cat([torch.arange(13 - documents), torch.zeros(documents - 1, dtype=torch.long)])
        assert borders(positions[None]).tolist() == [0, *range(2 * (13 - documents), 25, 2)]
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "device, asked, precision, installed, message",
    [
        (
            "cpu",
            "flash_attention_2",
            "bf16",
            True,
            "flash_attention_2 cannot run on cpu: its kernels need a CUDA device; use sdpa or auto",
        ),
        (
            "cpu",
            "kernels-community/flash-attn2",
            "bf16",
            True,
            "kernels-community/flash-attn2 cannot run on cpu: .* use sdpa",
        ),
        (
            "cuda",
            "flash_attention_3",
            "no",
            True,
            "cannot run on cuda: it computes in half precision and this run in float32; add --dtype bfloat16",
        ),
        (
            "cuda",
            "flash_attention_4",
            "bf16",
            False,
            "neither flash-attn-4 nor kernels is installed; pip install flash-attn-4",
        ),
        ("cuda", "kernels-community/flash-attn2", "bf16", False, "kernels is not installed; pip install kernels"),
        (
            "cuda",
            "flash_attention_9",
            "bf16",
            True,
            "flash_attention_9 is unknown; choose from auto, .* flash_attention_2",
        ),
        ("cuda", "flash_attention_2", "bf16", True, None),
        ("cuda", "kernels-community/flash-attn2", "fp16", True, None),
    ],
)
def test_where_flash_cannot_run_the_flag_says_why_and_what_to_do(
    monkeypatch, device, asked, precision, installed, message
):
    monkeypatch.setattr(attention, "is_kernels_available", lambda: installed)
    if message is None:
        assert attention.choose_attention(torch.device(device), asked, precision=precision) == (asked, "asked for")
    else:
        with pytest.raises(ValueError, match=message):
            attention.choose_attention(torch.device(device), asked, precision=precision)


def test_what_transformers_cannot_load_is_one_error_of_the_flag():
    with pytest.raises(
        ValueError, match=r"--attn flash_attention_3 cannot be loaded: .*(installed|CPU).*; use sdpa or auto"
    ):
        attention.set_attention(build(), "flash_attention_3")
