"""What a user got wrong is said once by several processes, which all leave with the same code; what one of them alone meets is said too."""

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
