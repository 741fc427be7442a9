"""The sandbox against programs that mean harm: with namespaces, and without them as in most containers."""

import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat_hf.tools import sandbox
from nanochat_hf.tools.sandbox import JAIL, Limits, protections, run

LINUX = sys.platform == "linux"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the sandbox needs POSIX")
NAMESPACES = LINUX and sandbox.namespaces_work()
MODES = [
    pytest.param(
        True, marks=pytest.mark.skipif(not NAMESPACES, reason="this system gives no namespaces"), id="namespaces"
    ),
    pytest.param(False, id="plain"),
]
each_mode = pytest.mark.parametrize("namespaces", MODES)


def limits(namespaces, seconds=3.0, **others):
    return Limits(seconds=seconds, namespaces=namespaces, **others)


def landlocked(namespaces):
    return any("Landlock" in wall for wall in run("", limits(namespaces)).walls)


def left_over():
    """Processes of the sandbox that still live."""
    alive = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if JAIL.encode() in (entry / "cmdline").read_bytes():
                    alive.append(int(entry.name))
            except OSError:
                pass
    return alive


def none_left():
    deadline = time.monotonic() + 30  # a killed process may take a moment to go
    while left_over() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not left_over()


@each_mode
@pytest.mark.parametrize(
    "source, error",
    [
        ("assert sum(range(4)) == 6", None),
        ("import dataclasses, math, collections\n@dataclasses.dataclass\nclass A:\n    x: 'int'\nA(1)", None),
        ("open('mine', 'w').write('x'); assert open('mine').read() == 'x'", None),
        ("print('é' * 10**6)", None),
        ("", None),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("assert False", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("\0", "null bytes"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "killed"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("input()", "EOFError"),
        ("def f(n): return f(n + 1)\nf(0)", "RecursionError"),
        ("raise ValueError('\\ud800' * 9999)", "ValueError"),
        (
            "import os\nif os.fork() == 0: pass\nelse: os.wait(); assert False",
            "AssertionError" if not LINUX or os.geteuid() else "Error",
        ),
    ],
)
def test_only_a_program_that_reaches_its_end_passes(namespaces, source, error):
    outcome = run(source, limits(namespaces))
    assert outcome.passed == (error is None)
    assert error is None or error in outcome.error
    assert outcome.error is None or len(outcome.error) < 400


@each_mode
@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, 1)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import os, time\nos.setsid()\nwhile True:\n    try:\n"
        "        if os.fork() == 0: os.setsid()\n    except OSError: time.sleep(0.01)",
    ],
)
def test_endless_programs_and_fork_bombs_end_with_the_time_and_leave_nothing(namespaces, source):
    start = time.monotonic()
    outcome = run(source, limits(namespaces, seconds=1))
    assert not outcome.passed and time.monotonic() - start < 30  # of programs that would go on for a minute or for ever
    assert none_left() if LINUX else True


@pytest.mark.skipif(not LINUX, reason="stragglers are found through /proc")
@each_mode
def test_what_leaves_its_group_and_outlives_its_parent_is_killed(namespaces):
    run(
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)\n    os._exit(0)",
        limits(namespaces),
    )
    assert none_left()


@pytest.mark.skipif(not LINUX, reason="macOS does not hold programs to a limit of memory")
@each_mode
def test_memory_files_and_processes_are_bounded(namespaces):
    for source in (
        "x = bytearray(10**10)",
        "x = [0]\nwhile True: x = x * 2",
        "x = 'a' * 2**40",
        "import mmap; mmap.mmap(-1, 2**34)",
    ):
        outcome = run(source, limits(namespaces, seconds=10))
        assert not outcome.passed and ("Memory" in outcome.error or "memory" in outcome.error), source
    many = "import os\nfor i in range(%d):\n    with open(f'f{i}', 'wb') as f: f.write(b'x' * 2**20)"
    assert run(many % 3, limits(namespaces)).passed
    assert not run("open('big', 'wb').write(b'x' * 2**22)", limits(namespaces, disk=2**21)).passed
    if namespaces:  # all files together
        assert "No space" in run(many % 20, limits(True)).error
    started = run(
        "import os, time\nfor i in range(50):\n    if os.fork() == 0: time.sleep(5); os._exit(0)", limits(namespaces)
    )
    assert not started.passed and ("BlockingIOError" in started.error or "PermissionError" in started.error)


@pytest.mark.skipif(not LINUX, reason="only Linux shields other processes")
@each_mode
def test_the_caller_cannot_be_killed_read_or_traced(namespaces, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_CALLER", "hidden")
    assert run("import os; assert 'SECRET_OF_THE_CALLER' not in os.environ", limits(namespaces)).passed
    for target in ("os.getppid()", str(os.getpid()), "-1"):
        run(f"import os, signal; os.kill({target}, signal.SIGKILL)", limits(namespaces))  # the test would not go on
    read = """
import os
for pid in os.listdir('/proc'):
    if pid.isdigit() and int(pid) != os.getpid():
        try: found = open(f'/proc/{pid}/environ', 'rb').read()
        except OSError: continue
        assert b'SECRET_OF_THE_CALLER' not in found
"""
    outcome = run(read, limits(namespaces))
    if namespaces or landlocked(namespaces):
        assert outcome.passed or "NotFound" in outcome.error or "Permission" in outcome.error
    parent = f"data = open('/proc/{os.getpid()}/environ', 'rb').read()"
    if namespaces or landlocked(namespaces):
        assert not run(parent, limits(namespaces)).passed
        assert not run(f"open('/proc/{os.getpid()}/mem', 'rb')", limits(namespaces)).passed
    trace = f"import ctypes\nassert ctypes.CDLL(None).ptrace(16, {os.getpid()}, 0, 0) == -1"
    assert run(trace, limits(namespaces)).passed


@pytest.mark.skipif(not LINUX, reason="only Linux shields files")
@each_mode
def test_nothing_outside_the_folder_is_written_and_no_home_is_read(namespaces, tmp_path):
    if not (namespaces or landlocked(namespaces)):
        pytest.skip("neither namespaces nor Landlock here")
    target, secret = tmp_path / "written", tmp_path / "secret"
    secret.write_text("private")
    os.chmod(tmp_path, 0o777)
    for source in (
        f"open({str(target)!r}, 'w').write('x')",
        f"import os; os.mkdir({str(target)!r})",
        f"import os; os.symlink('a', {str(target)!r})",
        f"open({str(secret)!r}, 'a').write('x')",
        f"open({str(secret)!r}).read()",
        f"import os; os.remove({str(secret)!r})",
        f"import os; os.rename({str(secret)!r}, 'mine')",
        "open('/etc/passwd').read()",
        "open('/usr/written', 'w')",
        "open('../x', 'w')",
        f"open({sandbox.__file__!r}, 'a')",
        "import os; os.listdir(os.path.expanduser('~root'))",
        "import os; os.chroot('.')",
    ):
        assert not run(source, limits(namespaces)).passed, source
    assert not target.exists() and secret.read_text() == "private" and not Path("/usr/written").exists()
    if namespaces:  # a mount cannot be undone
        undone = f"""
import ctypes
libc = ctypes.CDLL(None)
assert libc.umount2(b'/tmp', 2) == -1 and libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) == -1
libc.chmod({str(secret)!r}.encode(), 0)
"""
        assert run(undone, limits(namespaces)).passed and os.stat(secret).st_mode & 0o777


@pytest.mark.skipif(not LINUX, reason="only Linux shields the network")
@each_mode
def test_no_network(namespaces):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for source in (
            f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
            "import socket; socket.create_connection(('1.1.1.1', 53), 1)",
            "import socket; s = socket.socket(type=socket.SOCK_DGRAM); "
            "s.sendto(b'x', ('127.0.0.1', 999)); s.sendto(b'x', ('8.8.8.8', 53))",
        ):
            assert not run(source, limits(namespaces)).passed, source
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


def test_folders_are_removed_and_several_run_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    deep = "import os\nfor i in range(3000):\n    os.mkdir('d'); os.chdir('d')"
    sources = [
        "x = 1",
        "open('a', 'w')",
        "import time; time.sleep(0.3)",
        "1 / 0",
        "import os; os.mkdir('d'); os.chmod('d', 0)",
    ]
    with ThreadPoolExecutor(4) as pool:
        passed = [outcome.passed for outcome in pool.map(run, sources)]
    assert passed == [True, True, True, False, True]
    run(deep, Limits(namespaces=False))
    assert not list(tmp_path.iterdir())


def test_one_line_says_what_protects():
    line = protections()
    assert line.startswith("sandbox: ") and "\n" not in line and "limits on" in line
    assert ("namespaces for" in line) == NAMESPACES
    assert "no namespaces" in protections(Limits(namespaces=False))


def test_a_sandbox_that_cannot_start_fails_in_words(monkeypatch):
    monkeypatch.setattr(sandbox, "JAIL", "/nowhere.py")
    outcome = sandbox._run("x = 1", Limits())
    assert not outcome.passed and "did not end" in outcome.error
