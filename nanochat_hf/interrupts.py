"""Ctrl-C and SIGTERM as exceptions of the command's own process, so that files, trackers and threads are closed."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Generator
from types import FrameType

HEAD_START = 0.5  # seconds in which a pool learns that it is to end, where SIGTERM went to all of its processes
DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Terminated(BaseException):
    """SIGTERM has come. As with KeyboardInterrupt, no `except Exception` holds it up."""


@contextlib.contextmanager
def interruptible() -> Generator[None]:
    """Within it Ctrl-C raises KeyboardInterrupt and SIGTERM Terminated; handlers that others have set stay.

    A process that is forked within it, as for tokenising, says nothing. It is ended by the one that forked it: a pool
    replaces workers that die before, and then waits for the new ones for ever.
    """
    owner = os.getpid()

    def receive(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            if number == signal.SIGTERM:
                time.sleep(HEAD_START)
                os._exit(128 + number)
            return
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    before = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in DEFAULTS:
                before[number] = signal.signal(number, receive)
    try:
        yield
    except Exception as error:
        if asked := interrupt_of(error):
            raise asked from None
        raise
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is receive:
                signal.signal(number, handler)


def interrupt_of(error: BaseException | None) -> BaseException | None:
    """The interrupt during which `error` was raised, as datasets does when it ends its processes; None without one."""
    while error is not None and not isinstance(error, KeyboardInterrupt | Terminated):
        error = error.__context__
    return error
