"""Files and folders that are whole or not there, whenever a kill, a full disk or a power cut comes.

A folder is filled under a name of its own, flushed to the disk and then swapped in with one rename. What a killed
program leaves behind has names that begin with a dot, and `clear_leftovers` takes it away.
"""

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Generator
from pathlib import Path

from safetensors import SafetensorError

PARTIAL, OLD = ".partial", ".old"  # endings of a folder that is being written, and of one that is being replaced
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' renameat2
# What the libraries below us make of a full disk: torch's writer, and the tokenizers' Rust code.
_DISK_WORDS = ("PytorchStreamWriter failed", "unexpected pos", "(os error ")


def disk_error(error: BaseException) -> bool:
    """Whether `error` says that the disk could not be written to.

    Torch, safetensors and tokenizers each have a kind of their own.
    """
    return isinstance(error, OSError | SafetensorError) or any(word in str(error) for word in _DISK_WORDS)


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Generator[Path]:
    """Yields an empty folder to fill, which takes the place of `folder` once all of it is on the disk.

    Where the body raises, or the disk is full, `folder` stays what it was and nothing else remains.
    """
    folder = Path(folder)
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        publish(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_of(folder: Path) -> Path:
    """Where `folder` is written before it is whole: for run/final this is run/.final.partial."""
    return folder.with_name(f".{folder.name}{PARTIAL}")


def publish(partial: Path, folder: Path) -> None:
    """Flush `partial` to the disk and put it in the place of `folder`."""
    for path in partial.rglob("*"):
        flush(path)
    flush(partial)
    replaced = folder.with_name(f".{folder.name}{OLD}")
    shutil.rmtree(replaced, ignore_errors=True)
    if not folder.exists():
        os.rename(partial, folder)
    elif _exchange(partial, folder):
        os.rename(partial, replaced)
    else:  # for a moment there is none; clear_leftovers would put the old one back
        os.rename(folder, replaced)
        os.rename(partial, folder)
    flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    # swaps two folders at once, where the system and the file system can
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def clear_leftovers(folder: str | Path, *, also: tuple[str, ...] = ()) -> list[str]:
    """Take away what a killed program left in `folder`, and the folders named in `also`; returns a sentence for each.

    A folder that was being replaced is put back where its successor is missing.
    """
    told = []
    for path in sorted(Path(folder).glob(".*")):
        replaced = path.with_name(path.name[1:].removesuffix(OLD))
        if path.name.endswith(OLD) and not replaced.exists():
            os.rename(path, replaced)
            told.append(f"{replaced} is back: a killed run was about to replace it")
        elif path.name.endswith((PARTIAL, OLD)) or path.name in also:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            told.append(f"{path} is removed: a killed run left it half written")
    return told


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file that is the old one or the new one, never a part. OSError where the disk is full."""
    path = Path(path)
    partial = partial_of(path)
    try:
        partial.write_text(text, encoding="utf-8")
        flush(partial)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # folders of some network file systems
            raise
    finally:
        os.close(handle)
