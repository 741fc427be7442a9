"""One word for all processes of a run that meet the same error."""

import os
import re
import sys
import time
from datetime import timedelta

PATIENCE, LINGER = (
    10.0,
    3.0,
)  # seconds that a process waits for the main one's word, and the main one for the others to have it


def say_error(text):
    """Print `text` on stderr: on the main process at once, on another only where the main one does not soon say the same, numbers apart.

    A process that would leave first without a word could take it from the main one, for launchers end all when one has ended.
    """
    rank, world = (
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
    )  # set by every launcher of several processes
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


def _wake_others():
    """Close this process's connections, at which the others' collectives end: they would wait there without hearing anything."""
    import torch.distributed

    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def _without_numbers(text):
    return re.sub(r"\d+", "", text)


def _store(is_master, seconds):
    """The store of torch.distributed's rendezvous, whether the group has met there or not, and its key for the error."""
    from torch.distributed import TCPStore

    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun holds the store itself
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=is_master and not agent,
        wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
        multi_tenant=True,
    )
    return store, f"nanochat_hf/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def _tell(text, others):
    try:
        store, key = _store(True, LINGER)
        store.set(key, _without_numbers(text))
        store.add(f"{key}/told", 1)
        _wake_others()
        end = time.monotonic() + LINGER
        while store.add(f"{key}/heard", 0) < others and time.monotonic() < end:
            time.sleep(0.02)
    except (RuntimeError, KeyError):  # no store: the others then speak for themselves
        pass


def _note():
    """Let the others know that what they meet now has been told."""
    try:
        store, key = _store(False, LINGER)
        store.add(f"{key}/told", 1)
    except (RuntimeError, KeyError):
        pass


def _heard():
    """What the main process says; None where it says nothing."""
    try:
        store, key = _store(False, PATIENCE)
        said = store.get(key).decode()
        store.add(f"{key}/heard", 1)
        return said
    except (RuntimeError, KeyError):
        return None
