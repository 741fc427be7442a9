"""Checkpoints as files.

Nothing in them can run, generators come back exactly, and a folder that cannot be written is said at once.
"""

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat_hf.tokenizer import load_tokenizer
from nanochat_hf.training.generators import rng_state, set_rng_state
from nanochat_hf.training.opening import claimed
from nanochat_hf.training.saved import read_plain
from tests.support.processes import on_ranks


class Bomb:
    """A pickle that runs code where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_in_a_checkpoint_does_not_run(tmp_path):
    (tmp_path / "rank0.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
    torch.save({"data": Bomb(tmp_path / "ran")}, tmp_path / "rank1.pt")
    for name in ("rank0.pt", "rank1.pt", "missing.pt"):
        with pytest.raises(ValueError, match=f"{name}: damaged, missing or not ours .*older checkpoint") as caught:
            read_plain(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_generators_come_back_exactly_from_a_file(tmp_path):
    torch.save(rng_state(), tmp_path / "rng.pt")
    drawn = random.random(), np.random.rand(), torch.rand(3).tolist(), random.gauss(0, 1), np.random.randn()
    set_rng_state(read_plain(tmp_path / "rng.pt"))
    assert drawn == (random.random(), np.random.rand(), torch.rand(3).tolist(), random.gauss(0, 1), np.random.randn())


def share(rank, world, folder, where):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world
    os.chdir(Path(folder) / f"machine{rank}")  # a relative path is another folder on each "machine"
    try:
        with claimed(accelerator, where):
            said = "shared"
    except (OSError, ValueError) as error:
        said = str(error)
    (Path(folder) / f"{rank}.txt").write_text(said)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("run", ["--output-dir run: not all processes see it"] * 2),
        ("../run", ["shared"] * 2),
        ("file/run", ["--output-dir file/run: cannot be written to"] * 2),
    ],
)
def test_a_folder_that_one_process_does_not_see_ends_all_of_them(tmp_path, where, said):
    for rank in range(2):
        (tmp_path / f"machine{rank}").mkdir()
        (tmp_path / f"machine{rank}" / "file").write_text("")
    on_ranks(share, 2, str(tmp_path), where)
    for rank in range(2):
        assert (tmp_path / f"{rank}.txt").read_text().startswith(said[rank])


def test_a_run_in_place_of_its_model_is_told_where_the_model_is(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "config.json").write_text("{}")  # the run's settings
    with pytest.raises(ValueError, match="did you mean .*final, the run's model"):
        load_tokenizer(tmp_path)
