"""Under `accelerate launch`: a stop signal to the launcher and the launcher's death both save.

Its own launch types are refused.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat_hf.machine.accelerator import build_accelerator
from tests.support.training import flags

ROOT = Path(__file__).parents[2]


def launched(start, output, log, **changed):
    """The launcher's process, started as the documentation says, once training is under way."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "accelerate_configs/cpu.yaml",
        "-m",
        "scripts.chat_sft",
    ]
    options = [str(part) for part in flags(start, output, **({"num_steps": 100000, "save_every": 0} | changed))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCH_COMPILE_DISABLE": "1"}
    with log.open("w") as file:
        process = subprocess.Popen([*command, *options], cwd=ROOT, stdout=file, stderr=file, env=environment)
    until(lambda: "step 3/" in log.read_text() or process.poll() is not None, 240)
    assert process.poll() is None, log.read_text()[-2000:]
    return process


def until(true, seconds):
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["sigterm", "killed"])
def test_the_end_of_the_launcher_saves(start, tmp_path, number):
    process = launched(start, tmp_path / "run", tmp_path / "log")
    process.send_signal(number)
    process.wait(240)
    assert process.returncode != 0  # the launcher's own: its child's 143 does not come through
    assert until(lambda: "stopped at step" in (tmp_path / "log").read_text(), 240), (tmp_path / "log").read_text()[
        -2000:
    ]
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    assert json.loads((saved / "trainer.json").read_text())["state"]["step"] >= 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "ctrl-c"])
def test_a_signal_to_the_whole_group_saves_though_workers_make_the_batches(start, tmp_path, number):
    log = tmp_path / "log"
    options = flags(start, tmp_path / "run", num_steps=100000, save_every=0, num_workers=1)
    with log.open("w") as file:
        command = [sys.executable, "-m", "scripts.chat_sft", *map(str, options)]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "ACCELERATE_USE_CPU": "1",
            "TORCH_COMPILE_DISABLE": "1",  # so many steps would be worth compiling
        }
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        assert until(lambda: "step 3/" in log.read_text(), 240), log.read_text()[-2000:]
        os.killpg(process.pid, number)
        assert process.wait(240) == 143, log.read_text()[-2000:]
    finally:  # nothing trains on after a test that failed
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


WATCHER = """
import os, time
from nanochat_hf.machine.accelerator import build_accelerator
from nanochat_hf.training.stopping import StopSignal
stop, parent = StopSignal(build_accelerator(1)), os.getppid()
print("ready", flush=True)
while os.getppid() == parent:
    time.sleep(0.01)
print("stop" if stop.agreed() else "go on", flush=True)
"""


@pytest.mark.parametrize("launched, said", [(False, "go on"), (True, "stop")])
def test_without_a_launcher_a_script_outlives_the_shell_that_started_it(tmp_path, launched, said):
    (tmp_path / "watcher.py").write_text(WATCHER)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("ACCELERATE_MIXED_PRECISION", "RANK")
    }
    environment |= {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1"} | (
        {"ACCELERATE_MIXED_PRECISION": "no"} if launched else {}
    )
    shell = "nohup $0 watcher.py > log 2>&1 & until grep -q ready log; do sleep 0.1; done"
    subprocess.run(["sh", "-c", shell, sys.executable], cwd=tmp_path, env=environment, timeout=240, check=True)
    assert until(lambda: said in (tmp_path / "log").read_text(), 240), (tmp_path / "log").read_text()


@pytest.mark.parametrize("flag, kind", [("--use_deepspeed", "DeepSpeed"), ("--use_megatron_lm", "Megatron-LM")])
def test_launch_types_with_optimizers_of_their_own_are_refused_in_one_line(monkeypatch, flag, kind):
    from accelerate.commands.launch import launch_command_parser

    arguments = launch_command_parser().parse_args([flag, "--mixed_precision", "bf16", "-m", "scripts.chat_sft"])
    assert getattr(arguments, flag.strip("-"))  # the launcher turns it into the variable
    monkeypatch.setenv(
        {"DeepSpeed": "ACCELERATE_USE_DEEPSPEED", "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM"}[kind], "true"
    )
    with pytest.raises(
        ValueError, match=f"{kind} keeps its own optimizer and cannot run Muon; launch with DDP"
    ) as caught:
        build_accelerator(1)
    assert "\n" not in str(caught.value)
