"""Push during training: a callback that hands what Save wrote, and at the end the final model, to a pusher (hub.push.HubPusher)."""

from nanochat_hf.training.checkpoint import checkpoints


def attach(trainer, pusher, output_dir):
    """Add a Push to the trainer's callbacks, last, so that it comes after Save; returns it. `pusher` None pushes nothing."""
    push = Push(pusher if trainer.accelerator.is_main_process else None, output_dir)
    trainer.callbacks.append(push)
    return push


class Push:
    """After each checkpoint, by the pusher's strategy; `finish` pushes the final model and waits. One process only, never raises."""

    def __init__(self, pusher, output_dir):
        self.pusher, self.output_dir = pusher, output_dir

    def __call__(self, trainer, info):
        last = info.step == trainer.num_steps and not trainer.stopped  # then finish() comes, with the exported model
        if self.pusher is None or self.pusher.strategy == "end" or last:
            return
        folder = self._newest()
        if folder and folder.name.endswith(f"-{info.step:06d}"):
            self.pusher.submit(folder, run_dir=self.output_dir, checkpoint=self._state(), message=f"Step {info.step}")

    def _newest(self):
        found = checkpoints(self.output_dir)
        return found[-1] if found else None

    def _state(self):
        return self._newest() if self.pusher.strategy == "checkpoint" else None

    def finish(self, final=None, step=None):
        """Push the folder `final` (None: the run was stopped), then wait for all that is under way. Call it behind the last barrier,
        because other processes would wait for the upload there."""
        if self.pusher is None:
            return
        if final:
            self.pusher.submit(
                final, run_dir=self.output_dir, checkpoint=self._state(), message=f"Final model, step {step}"
            )
        self.pusher.finish()
