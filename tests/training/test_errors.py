"""What a user got wrong is said once by several processes, which all leave with the same code.

What one of them alone meets is said too.
"""

import os
import sys

import pytest

from tests.support.processes import on_ranks
from tests.support.training import train


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"max_seq_len": 0}, "--max-seq-len 0 must be at least 1"),
        ({"config": "none.yaml"}, "--config none.yaml: cannot be read"),
        ({"devce_batch_size": 3}, "did you mean --device-batch-size?"),
        ({"num_steps": "x"}, "invalid int value: 'x'"),
        ({"model": "nowhere"}, "--model nowhere"),
        ({"total_batch_size": 7}, "--total-batch-size 7 must be"),
        ({"data": "none.jsonl"}, "none.jsonl: no such file"),
        ({"warmdown_ratio": 1, "warmup_steps": 4}, "overlap in a run of 8 steps"),
        ({"resume": "none"}, "--resume none"),
        ({"output_dir": "/proc/run"}, "--output-dir /proc/run: cannot be written to"),
    ],
)
def test_several_processes_say_a_users_error_once(start, tmp_path, changed, said, world):
    run = train(start, tmp_path / "run", tmp_path / "log", world, **changed)
    assert run.wait(60) == [2] * world, run.text()
    assert run.text().count(said) == 1 and run.text().count("error: ") == 1 and "Traceback" not in run.text(), (
        run.text()
    )


def alone(rank, world, folder):
    from nanochat_hf import errors
    from nanochat_hf.config import user_errors

    errors.PATIENCE = errors.LINGER = 1.0

    @user_errors
    def main():
        if rank == 1:
            raise ValueError("the disk of process 1 is full")

    with open(f"{folder}/{rank}", "w") as sys.stderr:
        try:
            main()
        except SystemExit as ended:
            print(f"code {ended.code}", file=sys.stderr)
    os._exit(0)


def test_what_one_process_alone_meets_is_not_lost(tmp_path):
    on_ranks(alone, 2, str(tmp_path))
    assert (tmp_path / "0").read_text() == ""
    assert (tmp_path / "1").read_text() == "error: the disk of process 1 is full (process 1)\ncode 2\n"


def one_fails(rank, world, folder, failing):
    import torch
    from accelerate import Accelerator

    from nanochat_hf import errors
    from nanochat_hf.config import user_errors

    errors.PATIENCE = errors.LINGER = 3.0
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world

    @user_errors
    def main():
        if rank == failing:
            raise OSError("the disk is full; free space")
        accelerator.reduce(torch.ones(1))  # waits for the one that failed

    with open(f"{folder}/{rank}", "w") as sys.stderr:
        try:
            main()
        except SystemExit as ended:
            print(f"code {ended.code}", file=sys.stderr)
        except BaseException as error:
            print(f"traceback of {error!r}", file=sys.stderr)
    os._exit(0)


@pytest.mark.parametrize("failing", [0, 1])
def test_one_processs_error_ends_all_with_its_one_line(tmp_path, failing):
    on_ranks(one_fails, 2, str(tmp_path), failing)
    said = {rank: (tmp_path / str(rank)).read_text() for rank in range(2)}
    which = " (process 1)" if failing else ""
    assert said[failing] == f"error: the disk is full; free space{which}\ncode 2\n"
    assert said[1 - failing] == "code 2\n"


def full_disk_on_main(rank, world, folder):
    from accelerate import Accelerator

    from nanochat_hf.training.together import on_main

    def fail():
        raise RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0: file write failed")

    try:
        on_main(Accelerator(cpu=True), fail)
        said = "went on"
    except OSError as error:
        said = str(error)
    with open(f"{folder}/{rank}", "w") as file:
        file.write(said)


def test_a_disk_that_is_full_for_one_process_is_full_for_all(tmp_path):
    on_ranks(full_disk_on_main, 2, str(tmp_path))
    said = {(tmp_path / str(rank)).read_text() for rank in range(2)}
    assert len(said) == 1 and "PytorchStreamWriter failed" in said.pop()
