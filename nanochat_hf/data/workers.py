"""Batches made ahead of the step that takes them, by a thread or by DataLoader workers."""

import atexit
import os
import queue
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from typing import Any

import torch

STOPPING = "nanochat_hf_stopping"  # the attribute of a thread that holds the event by which it is told to stop
_running: "weakref.WeakSet[_Ahead]" = weakref.WeakSet()


class Stopped(BaseException):
    """Raised in a thread that makes items ahead when they are no longer wanted; no `except Exception` catches it."""


def check_stopped() -> None:
    """Raise Stopped if this thread was told to stop; every loop that may run for long calls it."""
    asked = getattr(threading.current_thread(), STOPPING, None)
    if asked is not None and asked.is_set():
        raise Stopped


class _Ahead:
    """A thread that puts the items of an iterable into a bounded queue until it is told to stop."""

    def __init__(self, items: Iterable, depth: int, pin: bool) -> None:
        self.items, self.pin = items, pin
        self.queue: queue.Queue = queue.Queue(depth)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True)
        setattr(self.thread, STOPPING, self.stopping)
        _running.add(self)
        self.thread.start()

    def _work(self) -> None:
        try:
            for item in self.items:
                if not self._put((item if not self.pin else pinned(item), None)):
                    return
            self._put((None, StopIteration()))
        except Stopped:
            pass
        except BaseException as error:  # `ahead` raises it again
            self._put((None, error))
        finally:
            close = getattr(self.items, "close", None)
            if close is not None:
                close()

    def _put(self, entry: tuple) -> bool:
        while not self.stopping.is_set():
            try:
                self.queue.put(entry, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def stop(self) -> None:
        """End the thread; items that it made and nobody took are lost."""
        self.stopping.set()
        if self.thread is not threading.current_thread():
            self.thread.join()


@atexit.register
def _stop_all() -> None:
    # a thread that is still inside torch when the interpreter shuts down aborts the process
    for ahead in list(_running):
        ahead.stop()


def pinned(item: Any) -> Any:
    """Move the tensors of a (nested) dict, tuple or list to page-locked memory; copies to the GPU then do not wait."""
    if isinstance(item, torch.Tensor):
        return item.pin_memory()
    if isinstance(item, dict):
        return {key: pinned(value) for key, value in item.items()}
    return type(item)(map(pinned, item)) if isinstance(item, tuple | list) else item


def ahead(items: Iterable, depth: int = 2, pin: bool | None = None) -> Generator:
    """The items of a generator, of which a thread makes up to `depth` ahead; with depth 0 they are made when asked for.

    The thread pins their memory where there is a GPU, or as `pin` says. An exception of the generator is raised here,
    after the items before it.

    >>> list(ahead(iter([1, 2])))
    [1, 2]
    """
    if not depth:
        yield from items
        return
    worker = _Ahead(items, depth, torch.cuda.is_available() if pin is None else pin)
    try:
        while True:
            item, error = worker.queue.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        worker.stop()


def same(item: Any) -> Any:
    """The item itself: the collate function where the data set makes whole batches."""
    return item


def quiet_worker(_: int) -> None:
    """Prepare a worker process: one thread each, since the workers together already use the cores."""
    # a process group of its own: a Ctrl-C or SIGTERM to the trainer's group would end it before the trainer has saved
    os.setpgid(0, 0)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def worker_loader(
    dataset: Any,
    *,
    num_workers: int,
    collate: Callable = same,
    batch_sampler: Iterable | None = None,
    prefetch: int = 2,
) -> Iterable:
    """A DataLoader of `num_workers` processes that each keep `prefetch` batches ready, pinned where there is a GPU."""
    batching: dict[str, Any] = {"batch_size": None} if batch_sampler is None else {"batch_sampler": batch_sampler}
    return torch.utils.data.DataLoader(
        dataset,
        **batching,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=max(1, prefetch),
        worker_init_fn=quiet_worker,
        # Each iteration draws a seed. From torch's global generator it would be one draw more in a resumed run
        generator=torch.Generator(),
    )


def plain_errors(loader: Iterable) -> Iterator:
    """The items of a DataLoader; a worker's ValueError or OSError is raised without torch's traceback in its text."""
    try:
        yield from loader
    except (ValueError, OSError) as error:
        head, traceback, told = str(error).rpartition("Traceback (most recent call last):")
        if not traceback or not head.startswith("Caught"):
            raise
        # the frames are indented; the last lines are the kind of the error and its message
        message = [line for line in told.splitlines() if line and not line.startswith(" ")]
        raise ValueError(" ".join(message).partition(": ")[2]) from None


def first(batches: Iterable, count: int) -> list:
    """The first `count` items of an iterable as a list; its iterator is then closed, which ends its threads."""
    made: Any = iter(batches)
    try:
        return list(islice(made, count))
    finally:
        made.close()
