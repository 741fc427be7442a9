"""Runs Python that a model wrote, as harmless as the system allows.

What holds where (`protections()` says it for this machine):

| | Linux with namespaces | Linux without | other |
|---|---|---|---|
| memory, CPU and wall time, size of a file, processes | yes | yes | what setrlimit holds to: not memory on macOS |
| the caller's environment | not given, not to be read | not given; not to be read with Landlock or as another user | not given |
| files | reads Python, writes a tmpfs of bounded size | with Landlock (Linux 5.13): reads Python, writes its folder | what the user may |
| signals to others | none is visible | refused by a filter of system calls | what the user may |
| network | none | refused by the filter | open |
| what the program started | ends with it | ends with it | its process group ends |

Namespaces need the right to make user namespaces, or root with CAP_SYS_ADMIN; containers often refuse both. There, and on macOS, run
programs of models you do not trust in a virtual machine. Root runs the program as a user that owns nothing; without
namespaces only where that user can read the Python installation. A program that looks for it in the interpreter's memory can fake
its success.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

JAIL = str(Path(__file__).with_name("sandbox_jail.py"))
GRACE = 10  # seconds for the start and for the end of the sandbox itself


@dataclass(frozen=True)
class Limits:
    """Of one program: `seconds` of wall and of CPU time, bytes of `memory` a process and of `disk`, number of `processes` (threads count).

    `namespaces` and `landlock` can be turned off, as where the system lacks them.
    """

    seconds: float = 5.0
    memory: int = 512 * 2**20
    disk: int = 16 * 2**20
    processes: int = 8
    namespaces: bool = True
    landlock: bool = True


@dataclass(frozen=True)
class Outcome:
    """`passed`: the program's last line was reached; else `error` says why not. `walls` are the protections that stood."""

    passed: bool
    error: str | None
    walls: tuple = ()


def run(source, limits=None):
    """Run `source` (Python) to its end → Outcome; never raises for what the program does. OSError where no process can be started.

    run("assert 1 + 1 == 2") → passed; run("1 / 0").error → "ZeroDivisionError: division by zero". An early exit has not passed.
    """
    limits = limits or Limits()
    if limits.namespaces and not namespaces_work():
        limits = replace(limits, namespaces=False)
    outcome = _run(source, limits)
    if (
        limits.namespaces and not outcome.walls
    ):  # not this time: a temporary folder that the program's user cannot reach, say
        outcome = _run(source, replace(limits, namespaces=False))
    return outcome


@cache
def namespaces_work():
    """Whether this system lets the sandbox have namespaces of its own; tried once."""
    return _run("", Limits(seconds=30)).passed  # a busy machine is no reason to go without


def protections(limits=None):
    """One line: what protects this machine from a program in the sandbox."""
    walls = run("", limits).walls
    missing = (
        []
        if any("namespaces" in wall for wall in walls)
        else ["no namespaces (nanochat_hf/tools/sandbox.py says what that leaves open)"]
    )
    return "sandbox: " + "; ".join([*walls, *missing])


def _run(source, limits):
    folder = tempfile.mkdtemp(prefix="sandbox-")
    try:
        job = asdict(limits) | {"source": source.encode(errors="replace").decode(), "folder": folder}
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", JAIL],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            said = process.communicate(json.dumps(job).encode(), timeout=limits.seconds + GRACE)[0]
        except subprocess.TimeoutExpired:
            said = b""
        finally:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.stdout.close()
            process.wait()
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except RecursionError:  # a tree made very deep on purpose; rm walks it without recursion
            subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL)
    try:
        result = json.loads(said)
    except ValueError:
        return Outcome(False, "the sandbox was killed, or did not end in time")
    passed = result.get("passed", False)
    return Outcome(
        passed, None if passed else result.get("setup") or result.get("error"), tuple(result.get("walls", ()))
    )
