"""The start of a run: its Accelerator, its folder, and the checkpoint from which it goes on.

No other run may write to the folder until this one ends.
"""

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from nanochat_hf.machine import cpu
from nanochat_hf.machine.accelerator import agree
from nanochat_hf.machine.durable import clear_leftovers

from . import trackers
from .config import TrainConfig
from .equipment import accelerate
from .lock import locked
from .resuming import choose, refuse_others

UPLOADS = ".hub-stage"  # where a HubPusher lays out what it uploads


@dataclass(frozen=True)
class Opened:
    """A run that may begin. `checkpoint`: whose files are whole, and from which it goes on; None: it begins anew."""

    accelerator: Accelerator
    checkpoint: Path | None = None


@contextlib.contextmanager
def opened(
    config: TrainConfig, width: int = cpu.WIDTH, fetch: Callable[[str | None], str | None] = lambda name: name
) -> Generator[Opened]:
    """Open a run, for a model `width` channels wide, before any data is prepared, and close it when the body ends.

    In this order: the accelerator; the folder, locked, seen by all processes and free of leftovers; the checkpoint that
    --resume means (`fetch` brings names on the Hub to a folder); the trackers. ValueError and OSError, in one line,
    where one of these cannot be.
    """
    accelerator = accelerate(config, width)
    if config.run.plan_only:
        yield Opened(accelerator)
        return
    with contextlib.ExitStack() as stack:
        if config.run.writes:
            stack.enter_context(claimed(accelerator, config.run.output_dir))
        checkpoint = choose(accelerator, config.run.output_dir, fetch(config.run.resume), config.run.writes)
        if config.run.writes:
            refuse_others(config.run.output_dir, checkpoint)
        if config.track.trackers:
            name = f"{Path(config.run.output_dir).name}-{time.strftime('%Y%m%d-%H%M%S')}"
            _on_main(accelerator, lambda: trackers.start(accelerator, config.track, name, checkpoint))
        try:
            yield Opened(accelerator, checkpoint)
        except BaseException:
            trackers.finish(accelerator)
            raise


@contextlib.contextmanager
def claimed(accelerator: Accelerator, output_dir: str | Path) -> Generator[None]:
    """Make and lock `output_dir` for this run, on all processes; where nothing was written it goes again.

    ValueError where another run has it, or where one process does not see it, as on machines that share no storage.
    OSError where it cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        _on_main(accelerator, lambda: _claim(stack, Path(output_dir)))
        if agree(accelerator, not Path(output_dir).is_dir()):
            raise ValueError(
                f"--output-dir {output_dir}: not all processes see it; name a folder on storage that all machines share"
            )
        yield


def _on_main(accelerator, action):
    # what the main process cannot do ends all: one that went on alone would wait for it
    said = [None]
    if accelerator.is_main_process:
        try:
            action()
        except (OSError, ValueError) as caught:
            said = [(isinstance(caught, OSError), str(caught))]
    answer = broadcast_object_list(said)[0]
    if answer is not None:
        is_os, text = answer
        raise OSError(text) if is_os else ValueError(text)


def _claim(stack, folder):
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if made:
            stack.callback(_remove_empty, folder)  # after the lock's own file has gone
        warning = stack.enter_context(locked(folder))
    except OSError as error:
        raise OSError(
            f"--output-dir {folder}: cannot be written to ({error.strerror}); give a folder that can"
        ) from None
    if warning:
        print(warning, flush=True)
    for sentence in clear_leftovers(folder, also=(UPLOADS,)):
        print(sentence, flush=True)


def _remove_empty(folder):
    with contextlib.suppress(OSError):
        folder.rmdir()
