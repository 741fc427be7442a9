"""One run a folder: a second one is refused with the first one's name, and the lock goes with its process."""

import errno
import fcntl
import json
import os
import signal
import socket

import pytest

from nanochat_hf.training.lock import NAME, locked
from tests.support.training import here, train


def holder(folder):
    """The pid of a process that holds the lock of `folder` until it is killed."""
    told, tell = os.pipe()
    pid = os.fork()
    if not pid:
        with locked(folder):
            os.write(tell, b"x")
            signal.pause()
        os._exit(0)
    os.read(told, 1)
    return pid


def test_a_second_run_is_told_who_has_the_folder_until_that_one_dies(tmp_path):
    pid = holder(tmp_path)
    try:
        with pytest.raises(ValueError, match="another run writes there") as caught, locked(tmp_path):
            pass
        said = str(caught.value)
        assert socket.gethostname() in said and f"pid {pid}" in said and "since 20" in said and "\n" not in said
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with locked(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
        with pytest.raises(ValueError, match=f"pid {os.getpid()}"), locked(tmp_path):  # by this process itself
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_on_the_new_file(tmp_path, monkeypatch):
    real, path = fcntl.lockf, tmp_path / NAME

    def slow(handle, how):
        if monkeypatch is not None and path.exists() and not path.read_text():
            path.unlink()  # as the run does that ends between our open and our lock
            path.write_text("new")
        return real(handle, how)

    monkeypatch.setattr(fcntl, "lockf", slow)
    with locked(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with locked(tmp_path) as warning:
        assert "cannot be locked (its file system has no locks: No locks available)" in warning


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_in_a_folder_that_another_has_writes_nothing(start, tmp_path, world):
    pid = holder(tmp_path)
    try:
        run = train(start, tmp_path, tmp_path.parent / f"{world}.log", world)
        assert run.wait() == [2] * world, run.text()
        assert run.text().count(f"pid {pid}") == 1 and "Traceback" not in run.text(), run.text()
        assert "documents" not in run.text()  # nothing was prepared in vain
        assert [path.name for path in tmp_path.iterdir()] == [NAME]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_run_that_never_began_leaves_no_folder(start, tmp_path, capsys):
    assert here(start, tmp_path / "run", data=tmp_path / "none.jsonl") == 2
    assert "no such file" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
