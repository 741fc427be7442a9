"""One run a folder: a lock that ends with its process."""

import contextlib
import datetime
import errno
import json
import os
import socket
import time
from collections.abc import Generator
from pathlib import Path

NAME = ".lock"
_held: set[Path] = set()  # a process may lock the same file twice, so what this one holds is remembered here
# how a file system says that it has no locks
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def locked(folder: str | Path) -> Generator[str]:
    """Hold the lock of `folder`, which exists; yields "" or a warning where the file system has no locks.

    The lock is POSIX's (fcntl), which ends with the process however it dies, is not inherited by forked workers, and
    holds between machines on NFS. ValueError names the host, the process and the start of the run that has it. OSError
    where nothing can be written.
    """
    path = Path(folder).resolve() / NAME
    if path in _held:
        raise ValueError(_taken(path, {"host": socket.gethostname(), "pid": os.getpid()}))
    handle, warning = _acquire(path)
    _held.add(path)
    try:
        yield warning
    finally:
        _held.discard(path)
        path.unlink(missing_ok=True)  # while it is still locked
        os.close(handle)


def _acquire(path):
    try:
        import fcntl
    except ImportError:  # Windows
        return _open(path), _warning(path, "this system has no POSIX locks")
    while True:
        handle = _open(path)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in _NO_LOCKS:
                return _open(path), _warning(path, f"its file system has no locks: {error.strerror}")
            raise ValueError(_taken(path, _holder(path))) from None
        if _is(handle, path):
            break
        os.close(handle)  # the run that had it has just removed the file: this one is nobody's any more
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}).encode())
    return handle, ""


def _open(path):
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)


def _is(handle, path):
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(path):
    for _ in range(20):  # the other run may have locked it a moment ago and be about to write its name
        with contextlib.suppress(OSError, ValueError):
            return json.loads(path.read_text())
        time.sleep(0.05)
    return {}


def _taken(path, holder):
    return (
        f"--output-dir {path.parent}: another run writes there (host {holder.get('host', 'unknown')}, "
        f"pid {holder.get('pid', 'unknown')}, since {holder.get('started', 'now')}); "
        "wait for its end or stop it, or give another --output-dir"
    )


def _warning(path, reason):
    return f"warning: --output-dir {path.parent} cannot be locked ({reason}); make sure that no other run writes there"
