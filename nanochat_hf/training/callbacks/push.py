"""Push during training: what Save wrote, and at the end the final model, is handed to a pusher (hub.push.HubPusher)."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nanochat_hf.training.checkpoint import newest, step_of

from .base import Callback

if TYPE_CHECKING:
    from nanochat_hf.training.trainer import StepInfo, Trainer


class Pusher(Protocol):
    """Who uploads folders: `strategy` is end, every_save or checkpoint."""

    strategy: str

    def submit(
        self,
        folder: str | Path,
        *,
        run_dir: str | Path | None = None,
        checkpoint: str | Path | None = None,
        message: str = "",
    ) -> None:
        """Push a folder, in the background."""

    def finish(self) -> bool:
        """Wait for what is under way."""


def attach(trainer: "Trainer", pusher: Pusher | None, output_dir: str | None) -> "Push":
    """Add a Push to the trainer's callbacks, last, so that it comes after Save; returns it.

    `pusher` None pushes nothing.
    """
    push = Push(pusher if trainer.accelerator.is_main_process else None, output_dir)
    trainer.callbacks.append(push)
    return push


class Push(Callback):
    """After each checkpoint, by the pusher's strategy; `finish` pushes the final model and waits.

    One process only, never raises.
    """

    def __init__(self, pusher: Pusher | None, output_dir: str | None):
        self.pusher, self.output_dir = pusher, output_dir

    def __call__(self, trainer: "Trainer", info: "StepInfo") -> None:
        """Push what Save has just written."""
        last = info.step == trainer.num_steps and not trainer.stopped  # then finish() comes, with the exported model
        if self.pusher is None or self.pusher.strategy == "end" or last:
            return
        folder = self._newest()
        if folder and step_of(folder) == info.step:
            self._submit(self.pusher, folder, f"Step {info.step}")

    def _newest(self):
        return newest(self.output_dir) if self.output_dir else None

    def _submit(self, pusher, folder, message):
        state = self._newest() if pusher.strategy == "checkpoint" else None
        pusher.submit(folder, run_dir=self.output_dir, checkpoint=state, message=message)

    def finish(self, final: Path | None = None, step: int | None = None) -> None:
        """Push the folder `final` (None: the run was stopped), then wait for all that is under way.

        Call it after the last barrier, because other processes would wait for the upload there.
        """
        if self.pusher is None:
            return
        if final:
            self._submit(self.pusher, final, f"Final model, step {step}")
        self.pusher.finish()
