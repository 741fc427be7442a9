"""One line for an error that all processes of a run meet, instead of one line from each."""

import os
import re
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

PATIENCE = 10.0  # seconds that another process waits for the main one to speak
LINGER = 3.0  # seconds that the main one stays, so that the others can read what it said


def say_error(text: str) -> None:
    """Print `text` on stderr, once for all processes of the run.

    The main process prints at once. Another process prints only if the main one does not soon report the same error;
    numbers are ignored in that comparison, because ranks count different things. The other processes wait for the main
    one: launchers kill all processes as soon as one has ended, so a process that left early could silence the main one.
    """
    # every launcher of several processes sets these two
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank == 0:
        print(text, file=sys.stderr, flush=True)
        if world > 1:
            _tell(text, world - 1)
    elif _heard() != _without_numbers(text):
        print(f"{text} (process {rank})", file=sys.stderr, flush=True)
        _note()


# What a process says of a collective whose other side has gone, in the words of gloo, NCCL and the store.
LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Socket", "store", "peer")


def is_consequence(error: BaseException) -> bool:
    """Whether `error` says only that another process has gone, and that one has told why."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not any(word in str(error) for word in LOST):
        return False
    try:
        store, key = _store(os.environ.get("RANK", "0") == "0", LINGER)
        store.add(f"{key}/heard", 1)
        return store.add(f"{key}/told", 0) > 0
    except (RuntimeError, KeyError):  # no store: its process has gone
        return False


def _wake_others() -> None:
    # others may wait for this process in a collective, where they hear nothing: it ends once the connections close
    import torch.distributed

    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+", "", text)


def _store(is_master: bool, seconds: float) -> "tuple[TCPStore, str]":
    # The key-value store where torch.distributed meets, and our key in it. It needs no process group.
    from torch.distributed import TCPStore

    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun itself holds the store
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=is_master and not agent,
        wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
        multi_tenant=True,
    )
    return store, f"nanochat_hf/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def _tell(text: str, others: int) -> None:
    try:
        store, key = _store(True, LINGER)
        store.set(key, _without_numbers(text))
        store.add(f"{key}/told", 1)
        _wake_others()
        end = time.monotonic() + LINGER
        while store.add(f"{key}/heard", 0) < others and time.monotonic() < end:
            time.sleep(0.02)
    except (RuntimeError, KeyError):  # no store: each process prints its own line
        pass


def _note() -> None:
    # what the others meet now has been told
    try:
        store, key = _store(False, LINGER)
        store.add(f"{key}/told", 1)
    except (RuntimeError, KeyError):
        pass


def _heard() -> str | None:
    # what the main process said, or None if it said nothing in time
    try:
        store, key = _store(False, PATIENCE)
        said = store.get(key).decode()
        store.add(f"{key}/heard", 1)
        return said
    except (RuntimeError, KeyError):
        return None
