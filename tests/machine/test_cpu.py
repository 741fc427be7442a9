"""What the CPU is asked, and that flags, launcher and checkpoint come before the answer."""

import json
import os

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from nanochat_hf.machine import accelerator, cpu
from nanochat_hf.optim import MuonAdamW

SLOW_HALF, FAST_HALF = cpu.Speed(60.0, 7.2), cpu.Speed(60.0, 180.0)


@pytest.fixture
def machine(monkeypatch):
    """A function that makes the CPU one of the given speed, with no word from a launcher."""
    for name in ("ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    AcceleratorState._reset_state(True)
    yield lambda speed: monkeypatch.setattr(cpu, "measure", lambda kind="cpu", width=256: speed)
    AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    cpu.set_threads.cache_clear()
    yield
    cpu.set_threads.cache_clear()
    torch.set_num_threads(before)


def test_a_speed_says_what_is_best_and_why():
    assert (SLOW_HALF.best, FAST_HALF.best, cpu.Speed(60.0, 70.0).best) == ("float32", "bfloat16", "float32")
    assert SLOW_HALF.describe() == "float32: bfloat16 products are 0.12 times as fast here (7.2 against 60 GFLOP/s)"


def test_the_measurement_takes_both_precisions_and_little_time():
    speed = cpu.measure.__wrapped__("cpu", 64)
    assert speed.float32 > 0 and speed.bfloat16 > 0
    call, flops = cpu._product("cpu", 2048, torch.float32)
    assert call().shape == (cpu.ROWS, 95) and flops == 2 * cpu.ROWS * 2048 * 95, "small whatever the width"
    call, flops = cpu._product("cpu", 64, torch.float32)
    assert call().shape == (cpu.ROWS, 256), "never wider than the model's own 4C"


@pytest.mark.parametrize(
    ("launched", "asked", "speed", "expected"),
    [
        (None, None, SLOW_HALF, "no"),
        (None, None, FAST_HALF, "bf16"),
        ("no", None, SLOW_HALF, "no"),
        ("no", None, FAST_HALF, "bf16"),
        ("bf16", None, SLOW_HALF, "bf16"),
        ("no", "bfloat16", SLOW_HALF, "bf16"),
        (None, "float32", FAST_HALF, "no"),
    ],
)
def test_flag_and_launcher_come_before_the_measurement(machine, monkeypatch, launched, asked, speed, expected):
    machine(speed)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert accelerator.build_accelerator(1, dtype=asked).mixed_precision == expected


@pytest.mark.parametrize(("speed", "expected"), [(SLOW_HALF, torch.float32), (FAST_HALF, torch.bfloat16)])
def test_muon_multiplies_in_what_is_faster_and_its_state_says_so(machine, speed, expected):
    machine(speed)

    def optimizer():
        param = torch.nn.Parameter(torch.eye(4))
        param.grad = torch.ones(4, 4)
        return MuonAdamW([{"kind": "muon", "params": [param], "lr": 0.02}])

    first = optimizer()
    first.step()
    assert first.orthogonalize_dtype == expected
    state = first.state_dict()
    machine(SLOW_HALF if speed is FAST_HALF else FAST_HALF)
    resumed = optimizer()
    resumed.load_state_dict(state)
    resumed.step()
    assert resumed.orthogonalize_dtype == expected, "a resumed run multiplies as it did before"


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [({1: 5.0, 2: 3.0}, 2), ({1: 1.5, 2: 5.5}, 1), ({1: 5.0, 2: 5.1}, 2), ({1: 9.0, 2: 4.0, 4: 8.0}, 2), ({1: 1.0}, 1)],
)
def test_fewer_threads_must_be_clearly_faster(rounds, expected):
    assert cpu.fewest_that_win(rounds) == expected


@pytest.mark.parametrize(
    ("environment", "physical", "expected"),
    [
        ({}, 8, [1, 4, 8]),
        ({"OMP_NUM_THREADS": "3"}, 8, [3]),  # no launcher: the user's own word
        (
            {"OMP_NUM_THREADS": "4", "ACCELERATE_MIXED_PRECISION": "no"},
            4,
            [1, 2, 4],
        ),  # what the launcher fills in is a bound
        ({"OMP_NUM_THREADS": "3", "ACCELERATE_MIXED_PRECISION": "no"}, 4, [3]),  # said in its YAML
        ({"LOCAL_WORLD_SIZE": "2"}, 8, [1, 2, 4]),
        ({"LOCAL_WORLD_SIZE": "16"}, 8, [1]),
    ],
)
def test_threads_that_are_tried(machine, monkeypatch, environment, physical, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cpu, "available_cores", lambda: 8)
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: physical)
    assert cpu.thread_choices() == expected


def test_a_container_gets_the_cores_of_its_quota(tmp_path):
    """Version 2 of control groups, a nested group, and version 1; no file and "max" are no limit."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    group = tmp_path / "cgroup"
    assert cpu.available_cores(tmp_path, group) == own
    group.write_text("0::/job/step\n")
    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (inner / "cpu.max").write_text("max 100000\n")
    assert cpu.available_cores(tmp_path, group) == own
    (tmp_path / "job" / "cpu.max").write_text("100000 100000\n")
    assert cpu.available_cores(tmp_path, group) == 1
    old = tmp_path / "old"
    (old / "cpu").mkdir(parents=True)
    (old / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    (old / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu.available_cores(old, tmp_path / "none") == 1


def test_set_threads_measures_only_where_there_is_a_choice(machine, monkeypatch):
    monkeypatch.setattr(cpu, "thread_choices", lambda: [1])
    assert cpu.set_threads() == cpu.Threads(1, {}) and torch.get_num_threads() == 1
    monkeypatch.setattr(cpu, "available_cores", lambda: 2)
    assert cpu.set_threads(64).count == 2, "a checkpoint of a larger machine"


def test_a_cpu_that_is_too_slow_is_told_so():
    assert cpu.too_slow(SLOW_HALF) is None
    assert "0.5 GFLOP/s" in cpu.too_slow(cpu.Speed(0.5, 0.1))
    assert cpu.training_seconds(48e9, cpu.Speed(60.0, 7.2)) == pytest.approx(2.0)


def test_a_resumed_run_keeps_precision_and_threads(tmp_path):
    from nanochat_hf.training.resuming import measured_before

    checkpoint = tmp_path / "checkpoint-000004"
    checkpoint.mkdir()
    settings = {"mixed_precision": "bf16", "cpu_threads": 3}
    facts = {"state": {"step": 4}, "num_processes": 1, "settings": settings}
    (checkpoint / "trainer.json").write_text(json.dumps(facts))
    assert measured_before(tmp_path, "auto") == measured_before("elsewhere", str(checkpoint)) == ("bfloat16", 3)
    assert measured_before(tmp_path, None) == measured_before(tmp_path / "empty", "auto") == (None, None)


def test_processes_are_counted_without_an_accelerator(machine):
    assert accelerator.process_count() == 1 and PartialState().num_processes == 1
    assert not AcceleratorState._shared_state
