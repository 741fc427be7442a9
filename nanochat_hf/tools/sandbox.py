"""Run Python that a model wrote, as safely as the system allows.

`protections()` says in one line what holds on this machine:

| | Linux with namespaces | Linux without | other |
|---|---|---|---|
| memory, CPU and wall time, file size, processes | limited | limited | by setrlimit; memory not on macOS |
| the caller's environment | hidden | not passed on; /proc needs Landlock or another user | not passed on |
| files | reads Python, writes a small tmpfs | with Landlock (Linux 5.13): reads Python, writes its folder | all |
| signals to other processes | none is visible | refused by a system call filter | allowed |
| network | none | refused by the filter | open |
| processes that it started | end with it | end with it | its process group ends |

Namespaces need the right to create user namespaces, or root with CAP_SYS_ADMIN; containers often refuse both. Without
them, and on macOS, run programs of models that you do not trust in a virtual machine. Root runs the program as a user
that owns nothing; without namespaces, only if that user can read the Python installation. A program can still fake its
success if it searches the interpreter's memory for the answer that is expected of it.
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
    """What one program may use.

    `seconds` of wall time, and as many of CPU time; bytes of `memory` for each process; bytes of `disk`; number of
    `processes`, threads included. `namespaces` and `landlock` can be turned off, to act as on a system without them.
    """

    seconds: float = 5.0
    memory: int = 512 * 2**20
    disk: int = 16 * 2**20
    processes: int = 8
    namespaces: bool = True
    landlock: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a program ended: `passed` if it reached its last line, else `error` says why not.

    `walls` names the protections that were in place.
    """

    passed: bool
    error: str | None
    walls: tuple[str, ...] = ()


def run(source: str, limits: Limits | None = None) -> Outcome:
    """Run `source` (Python) to its end. An early exit has not passed.

    Never raises for what the program does; raises OSError if no process can be started.

    >>> run("assert 1 + 1 == 2").passed
    True
    >>> run("1 / 0").error
    'ZeroDivisionError: division by zero'
    """
    limits = limits or Limits()
    if limits.namespaces and not namespaces_work():
        limits = replace(limits, namespaces=False)
    outcome = _run(source, limits)
    if limits.namespaces and not outcome.walls:
        # they worked before, but not now: perhaps the program's user cannot reach this temporary folder
        outcome = _run(source, replace(limits, namespaces=False))
    return outcome


@cache
def namespaces_work() -> bool:
    """Whether this system lets the sandbox create namespaces; tried once, then remembered."""
    return _run("", Limits(seconds=30)).passed  # long enough for a busy machine


def protections(limits: Limits | None = None) -> str:
    """One line that says what protects this machine from a program in the sandbox."""
    walls = run("", limits).walls
    missing = (
        []
        if any("namespaces" in wall for wall in walls)
        else ["no namespaces (nanochat_hf/tools/sandbox.py says what that leaves open)"]
    )
    return "sandbox: " + "; ".join([*walls, *missing])


def _run(source: str, limits: Limits) -> Outcome:
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
            if process.stdout is not None:
                process.stdout.close()
            process.wait()
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except RecursionError:  # the program made a very deep tree on purpose; rm does not recurse
            subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL)
    try:
        result = json.loads(said)
    except ValueError:
        return Outcome(False, "the sandbox was killed, or did not end in time")
    passed = result.get("passed", False)
    return Outcome(
        passed, None if passed else result.get("setup") or result.get("error"), tuple(result.get("walls", ()))
    )
