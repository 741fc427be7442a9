"""Compiled training: where it is chosen, that it happens, and that a resumed run is the uninterrupted one."""

import pytest
import torch

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.machine import compiling
from nanochat_hf.machine.accelerator import build_accelerator
from nanochat_hf.machine.compiling import PAYS_FROM, choose_compile
from tests.support.training import STEPS, save_model, train, weights

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.mark.parametrize(
    ("device", "wanted", "num_steps", "trial", "expected", "reason"),
    [
        (CPU, None, 1000, False, True, "it pays from 1,000 steps"),
        (CPU, None, 999, False, False, "999 steps on a CPU; at this size it pays from 1,000"),
        (CPU, None, 1000, True, False, "a dry run"),
        (CPU, True, 1, True, True, "asked for"),
        (CPU, False, 10**6, False, False, "asked for"),
        (CUDA, None, 1, True, True, "the default on cuda"),
        (MPS, None, 10**6, False, False, "the default on mps"),
    ],
)
def test_it_is_chosen_where_it_pays(monkeypatch, device, wanted, num_steps, trial, expected, reason):
    monkeypatch.setattr(compiling, "lacks", lambda: "")
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    chosen, because = choose_compile(device, wanted, num_steps, PAYS_FROM / 1000, trial)
    assert chosen is expected and reason in because


def test_a_cpu_without_what_it_takes_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    monkeypatch.setenv("CXX", str(tmp_path / "none++"))
    chosen, because = choose_compile(CPU, None, 10, PAYS_FROM)
    assert chosen is False and "lacks a C++ compiler" in because and "none++" in because
    monkeypatch.setenv("CXX", "sh")  # one that is found
    monkeypatch.setattr(compiling.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "Python's headers" in choose_compile(CPU, None, 10, PAYS_FROM)[1]
    (tmp_path / "Python.h").touch()
    assert choose_compile(CPU, None, 10, PAYS_FROM)[0] is True
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert choose_compile(CPU, None, 10, PAYS_FROM) == (False, "TORCH_COMPILE_DISABLE is set")


def test_an_accelerator_compiles_though_the_process_made_another_before():
    """As the scripts do, whose first Accelerator counts the processes."""
    model = NanochatForCausalLM(
        NanochatConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=1)
    )
    build_accelerator(1)
    compiled = build_accelerator(1, compile=True).prepare_model(model)
    assert isinstance(compiled, torch._dynamo.OptimizedModule)
    assert build_accelerator(1).prepare_model(model) is model


@pytest.mark.skipif(bool(compiling.lacks()), reason=f"torch.compile cannot run here: no {compiling.lacks()}")
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_compiled_run_resumes_bit_for_bit(start, tmp_path, world):
    # one layer, and no pool of compiling processes, which would import torch each
    own = {"TORCH_COMPILE_DISABLE": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    save_model(tmp_path / "model", layers=1)
    changed = {"model": tmp_path / "model", "compile": True, "save_every": 4, "environment": own}
    whole = train(start, tmp_path / "whole", tmp_path / "log", world, **changed)
    assert whole.wait(240) == [0] * world, whole.text()
    assert "compiled    yes (asked for)" in whole.text()
    again = train(
        start, tmp_path / "again", tmp_path / "log2", world, **changed, resume=tmp_path / "whole" / "checkpoint-000004"
    )
    assert again.wait(240) == [0] * world, again.text()
    assert f"at step 4 of {STEPS}" in again.text()
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "again").items())
