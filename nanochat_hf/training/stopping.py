"""Being asked to stop: by a signal to any process, or by the launcher's death."""

import os
import signal
import threading

from accelerate import Accelerator

from nanochat_hf.machine.accelerator import agree, any_rank


class StopSignal:
    """SIGTERM and SIGINT ask for a stop after the running step.

    So does the launcher's death, where there is a launcher: a script that a shell started by itself outlives the shell
    (nohup). Ranks agree through `agreed`.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.received, self.earlier = accelerator, 0, None
        # Accelerate's launcher sets the one, torchrun the other
        named = "ACCELERATE_MIXED_PRECISION" in os.environ or "RANK" in os.environ
        launched = accelerator.device.type == "xla" or named
        self.parent = os.getppid() if launched else None
        self.handlers = {}
        # XLA's launcher trains in a thread, where Python takes no handlers
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def release(self) -> None:
        """Give the signals back to who had them, once there is no step left to finish.

        What comes later may end the program.
        """
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _receive(self, number, frame):
        self.received = number

    def agreed(self) -> bool:
        """True on all ranks once any rank was asked to stop (one small collective when there are several).

        Several XLA devices learn it one step later, lest the host wait for the step that it has just sent off.
        """
        wanted = bool(self.received) or self.parent not in (None, os.getppid())
        if self.accelerator.num_processes == 1 or self.accelerator.device.type != "xla":
            return agree(self.accelerator, wanted)
        earlier, self.earlier = self.earlier, any_rank(self.accelerator, wanted)
        return earlier is not None and bool(earlier.item())
