"""Training on XLA gives the CPU's losses, saves, resumes exactly, and exports models that load anywhere."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanochat_hf.training.tracking import read_metrics
from tests.xla.conftest import LAUNCH, ROOT, STEPS, flags, run

PLAIN = Path(os.environ.get("PLAIN_PYTHON", ROOT / ".venv/bin/python")).absolute()
GREET = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = tokenizer("the cat sat", return_tensors="pt").input_ids
print(model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist())
"""


def losses(folder):
    """The loss of each step of a run that logged them all; the file holds their debiased moving average."""
    raw, average, weight = [], 0.0, 0.0
    for entry in read_metrics(folder / "metrics.jsonl"):
        if "train/loss" in entry:
            weight = 0.9 * weight + 0.1
            before, average = average, entry["train/loss"] * weight
            raw.append((average - 0.9 * before) / 0.1)
    return torch.tensor(raw, dtype=torch.float64)


def evaluations(folder):
    return torch.tensor([entry["val/bpb"] for entry in read_metrics(folder / "metrics.jsonl") if "val/bpb" in entry])


def apart(ours, expected):
    """Relative difference at each step."""
    assert len(ours) == len(expected) == STEPS
    return (ours - expected).abs() / expected


@pytest.fixture(scope="session")
def cpu_exact(data, sft_flags):
    run(
        "tests/xla/exact_products.py",
        "scripts.chat_sft",
        *sft_flags,
        *flags(output_dir=data / "cpu", dtype="float32"),
        xla=False,
    )
    return data / "cpu"


def test_base_training_has_the_curve_of_the_cpu(data, base, base_flags):
    run(
        "tests/xla/exact_products.py",
        "scripts.base_train",
        *base_flags,
        *flags(output_dir=data / "b", dtype="float32"),
        xla=False,
    )
    assert apart(losses(base), losses(data / "b")).max() < 1e-4
    torch.testing.assert_close(evaluations(base), evaluations(data / "b"), rtol=1e-4, atol=0)
    assert losses(base)[-1] < losses(base)[0] - 0.1


def test_fine_tuning_has_the_curve_of_the_cpu(data, sft_flags, cpu_exact):
    run("tests/xla/exact_products.py", "scripts.chat_sft", *sft_flags, *flags(output_dir=data / "x", dtype="float32"))
    assert apart(losses(data / "x"), losses(cpu_exact)).max() < 1e-4
    torch.testing.assert_close(evaluations(data / "x"), evaluations(cpu_exact), rtol=1e-4, atol=0)


def test_bfloat16_stays_within_its_noise(data, launched, sft_flags, cpu_exact):
    # the noise: how far bfloat16 on the CPU strays from float32, of which XLA's other order of rounding may be thrice
    run("-m", "scripts.chat_sft", *sft_flags, *flags(output_dir=data / "cpu-bf16", dtype="bfloat16"), xla=False)
    noise, ours = (apart(losses(folder), losses(cpu_exact)) for folder in (data / "cpu-bf16", launched))
    print(
        f"from float32 on the CPU: bfloat16 on the CPU {noise.mean():.1e}, "
        f"on XLA {ours.mean():.1e} (mean), {ours.max():.1e} (most)"
    )
    assert 0 < ours.mean() < 3 * noise.mean() and ours.max() < 0.05


def test_master_weights_stay_float32(launched):
    weights = load_file(launched / "checkpoint-000020" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    rounded = [name for name, value in weights.items() if torch.equal(value, value.bfloat16().float())]
    assert not rounded, "these hold nothing that bfloat16 could not"


def test_resumes_exactly(data, launched, sft_flags):
    """Started by the launcher, gone on without it, from the checkpoint of step 10."""
    printed = run(
        "-m", "scripts.chat_sft", *sft_flags, *flags(output_dir=data / "on", resume=launched / "checkpoint-000010")
    )
    assert f"at step 10 of {STEPS}" in printed
    whole, resumed = (load_file(folder / "final" / "model.safetensors") for folder in (launched, data / "on"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    state, other = (
        torch.load(folder / "checkpoint-000020" / "optimizer.pt")["optimizer"]["state"]
        for folder in (launched, data / "on")
    )
    assert all(torch.equal(value, other[i][key]) for i, values in state.items() for key, value in values.items())


def test_the_export_generates_here_and_in_a_plain_venv(launched, tmp_path):
    here = subprocess.run(
        [sys.executable, "-c", GREET, launched / "final"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert here.stdout.startswith("[")
    if not PLAIN.exists():
        pytest.skip(f"no plain venv at {PLAIN}")
    absent = subprocess.run([PLAIN, "-c", "import torch_xla"], capture_output=True, text=True)
    assert "No module named 'torch_xla'" in absent.stderr
    there = subprocess.run(
        [PLAIN, "-c", GREET, launched / "final"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert there.stdout == here.stdout


def test_a_dead_launcher_stops_the_run_with_a_checkpoint(data, sft_flags, tmp_path):
    """The launcher trains in a child's thread, where Python takes no signal handlers: the child sees its parent go."""
    command = [*LAUNCH, "scripts.chat_sft", *sft_flags, *flags(output_dir=tmp_path / "run")]
    command[command.index("--num-steps") + 1] = "5000"
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        wait_for(lambda: "step 4/5000" in (tmp_path / "log").read_text())
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(30)
    wait_for(lambda: "continue with --resume auto" in (tmp_path / "log").read_text())
    assert list((tmp_path / "run").glob("checkpoint-*/trainer.json"))


def wait_for(condition, seconds=200):
    """Wait until it holds; AssertionError after `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come true in time"
        time.sleep(0.2)
