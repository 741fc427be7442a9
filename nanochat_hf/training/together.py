"""What all processes do at the same point of a run: where one cannot, all end with the same words."""

from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import gather_object

from nanochat_hf.machine.accelerator import agree
from nanochat_hf.machine.durable import disk_error


def together(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Run `action` on this process. OSError on every process, with one text, where the disk refused it on any of them.

    It is a barrier too: no process goes on before all have done theirs.
    """
    said = None
    try:
        action()
    except Exception as error:  # torch, safetensors and tokenizers say a full disk in ways of their own
        if not disk_error(error):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
    if accelerator.num_processes > 1:
        said = _first(accelerator, said)
    if said is not None:
        raise OSError(said)


def _first(accelerator, said):
    # what the first process that failed said; on XLA, which gathers no text, others only learn that one did
    if accelerator.device.type != "xla":
        return next((text for text in gather_object([said]) if text is not None), None)
    failed = agree(accelerator, said is not None)
    return said or "another process could not write" if failed else None


def on_main(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """`together`, with something to do on the main process only."""
    together(accelerator, action if accelerator.is_main_process else lambda: None)
