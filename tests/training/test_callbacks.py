"""What the log says of loss and time."""

import math
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from nanochat_hf.training.callbacks.log import Log
from nanochat_hf.training.tracking import read_metrics
from nanochat_hf.training.trainer import StepInfo, TrainState

WAIT = 0.05


class Late:
    """A loss on a device that is `WAIT` seconds behind the host."""

    def __init__(self, value):
        self.value = value

    def float(self):
        return self

    def item(self):
        time.sleep(WAIT)
        return self.value


def entries(tmp_path, losses, *, late=False, every=1):
    """metrics.jsonl of a run of `losses`, one a step (None.

    A step without a target), each step of 0.01 host seconds.
    """
    optimizer = SimpleNamespace(param_groups=[], optimizer=SimpleNamespace(non_finite=lambda: (0, None)))
    trainer = SimpleNamespace(
        accelerator=Accelerator(cpu=True),
        state=TrainState(),
        num_steps=len(losses),
        optimizer=optimizer,
        batches=SimpleNamespace(epoch=0),
    )
    log = Log(trainer, "test", flops_per_token=1, every=every, output_dir=tmp_path)
    for step, loss in enumerate(losses, 1):
        trainer.state.step, trainer.state.tokens = step, 8 * step
        trainer.state.seconds += 0.01
        value = 0.0 if loss is None else loss
        log(trainer, StepInfo(step, Late(value) if late else torch.tensor(value), 0 if loss is None else 4, 1.0))
    return read_metrics(tmp_path / "metrics.jsonl")


def test_the_average_knows_neither_steps_without_targets_nor_what_is_not_finite(tmp_path):
    found = [entry["train/loss"] for entry in entries(tmp_path, [None, 2.0, None, math.nan, 2.0])]
    assert math.isnan(found[0]) and math.isnan(found[3])
    assert found[1:3] + found[4:] == pytest.approx([2.0, 2.0, 2.0])


def test_the_seconds_of_training_hold_the_wait_for_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat_hf.training.callbacks.log.sum_over_ranks", lambda accelerator: lambda value: value)
    first, second = entries(tmp_path, [1.0] * 4, late=True, every=2)
    assert first["train/seconds"] >= 0.02 + WAIT and second["train/seconds"] >= 0.04 + 2 * WAIT
    assert second["train/step_seconds"] == pytest.approx((second["train/seconds"] - first["train/seconds"]) / 2)
