"""The inside of the sandbox. sandbox.py starts this file as a program, so it imports the standard library only.

There are three processes. The watcher (main) keeps the time and reports. Its child puts the protections in place
(`confine`); in a PID namespace it is also that namespace's init. The program itself runs in the child, or below it.
The numbers of flags and system calls come from the kernel's headers.
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import secrets
import signal
import struct
import sys
import time
from typing import Any, NoReturn

# CLONE_NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS, and CLONE_NEWUSER
NEW_MOUNTS_PIDS_NETWORK_IPC_NAMES = 0x20000 | 0x20000000 | 0x40000000 | 0x8000000 | 0x4000000
NEW_USERS = 0x10000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
# System calls that are refused without namespaces: (AUDIT_ARCH, tgkill, the others, those that start processes).
# In x86_64's order the others are socket, kill, ptrace, rt_sigqueueinfo, tkill, rt_tgsigqueueinfo, prlimit64,
# process_vm_readv, process_vm_writev, pidfd_send_signal, io_uring_setup, pidfd_getfd. Those that start processes are
# clone, fork, vfork and clone3.
REFUSED = {
    "x86_64": (0xC000003E, 234, (41, 62, 101, 129, 200, 297, 302, 310, 311, 424, 425, 438), (56, 57, 58, 435)),
    "aarch64": (0xC00000B7, 131, (198, 129, 117, 138, 130, 240, 261, 270, 271, 424, 425, 438), (220, 435)),
}
# Root runs each program as another user, this number plus the process id, so that RLIMIT_NPROC counts each one alone.
OTHER_USERS, NOBODY = 2_000_000_000, 65534
LINUX = sys.platform == "linux"
libc = ctypes.CDLL(None, use_errno=True)


def call(name: str | int, *arguments: str | int | bytes | ctypes.Array | None) -> int:
    """Call a function of libc by name, or a system call by number. Raises OSError if it returns −1."""
    converted: list[Any] = [
        a.encode() if isinstance(a, str) else ctypes.c_long(a) if isinstance(a, int) else a for a in arguments
    ]
    function = libc.syscall if isinstance(name, int) else getattr(libc, name)
    result = function(*([ctypes.c_long(name)] if isinstance(name, int) else []), *converted)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def prctl(option: int, value: int, pointer: int | bytes = 0) -> None:
    """On Linux, make this system call; elsewhere do nothing."""
    if LINUX:
        call("prctl", option, value, pointer, 0, 0)


def enter_namespaces() -> None:
    """Enter new namespaces: no processes, network, mounts or shared memory of others.

    Root takes no user namespace, because outside of it the program would still be root.
    """
    if os.geteuid() == 0:
        try:
            call("unshare", NEW_MOUNTS_PIDS_NETWORK_IPC_NAMES)
            return
        except OSError:  # in a container, root may lack the right; go on as another user
            become_other_user()
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", NEW_MOUNTS_PIDS_NETWORK_IPC_NAMES | NEW_USERS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def readable_paths() -> list[str]:
    """List what a Python program must read: interpreter, packages, system libraries. No path lies below another."""
    found = [sys.base_prefix, sys.prefix, os.path.dirname(os.path.realpath(sys.executable)), *sys.path]
    found += ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"]
    kept = []
    for path in sorted({os.path.abspath(p) for p in found if p and os.path.exists(p)} - {"/"}):
        if not any(path.startswith(k + "/") for k in kept if not os.path.islink(k)):
            kept.append(path)
    return kept


def new_root(root: str, disk: int) -> None:
    """Make `root` the root folder: the readable paths, read-only, three devices and an empty /tmp of `disk` bytes."""
    call("mount", None, "/", None, MS_REC | MS_PRIVATE, None)
    call("mount", "tmpfs", root, "tmpfs", MS_NOSUID, "size=1m,mode=755")
    for path in (*readable_paths(), *DEVICES):
        target = root + path
        os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            open(target, "w").close()
        call("mount", path, target, None, MS_BIND | MS_REC, None)
        read_only(target, 0x8000)
    os.mkdir(root + "/tmp")
    call("mount", "tmpfs", root + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk},nr_inodes=4096,mode=1777")
    read_only(root, 0)
    os.chdir(root)
    call(PIVOT_ROOT[platform.machine()], ".", ".")
    call("umount2", ".", MNT_DETACH)
    os.chdir("/tmp")


def read_only(path: str, recursive: int) -> None:
    """Make a mount read-only and its set-user-id bits void; with AT_RECURSIVE also the mounts below it."""
    attributes = struct.pack("4Q", 1 | 2, 0, 0, 0)  # MOUNT_ATTR_RDONLY and MOUNT_ATTR_NOSUID
    call(MOUNT_SETATTR, -100, path, recursive, attributes, 32)


def become_other_user() -> None:
    """Change from root to a user that owns nothing. Raises PermissionError if there is none that can read Python."""
    for uid in (OTHER_USERS + os.getpid(), NOBODY):
        try:
            os.setegid(uid)
            os.seteuid(uid)
        except OSError:  # the container maps only few users
            os.seteuid(0)
            continue
        seen = os.access(os.__file__, os.R_OK, effective_ids=True)
        os.seteuid(0)
        if not seen:
            os.setegid(0)
            raise PermissionError(errno.EACCES, "another user cannot read the Python installation")
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        prctl(PR_SET_DUMPABLE, 1)  # otherwise the files in /proc/self would stay root's
        return
    raise PermissionError(errno.EPERM, "no other user can be taken here")


def landlock() -> int:
    """With Landlock (Linux 5.13), allow reading Python and writing the current folder, and nothing else.

    Returns Landlock's version; raises OSError without it. It always refuses /proc/PID/environ of other processes, from
    version 4 on TCP, from 6 on signals and abstract sockets to the outside.
    """
    version = call(LANDLOCK_CREATE, None, 0, 1)
    read, of_files = 0b1101, 0b111 | (1 << 14 if version >= 3 else 0) | (1 << 15 if version >= 5 else 0)
    everything = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    attributes = struct.pack("3Q", everything, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    ruleset = call(LANDLOCK_CREATE, attributes, 8 if version < 4 else 16 if version < 6 else 24, 0)
    for path, access in [
        *((p, read) for p in readable_paths()),
        *((d, everything) for d in DEVICES),
        (".", everything),
    ]:
        if not os.path.exists(path):
            continue
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", access if os.path.isdir(path) else access & of_files, fd)
        call(LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(fd)
    call(LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)
    return version


def filter_calls() -> None:
    """Install a seccomp filter: no sockets, no signals to other processes, no access to their memory.

    Root may not start processes either, because RLIMIT_NPROC does not bind root. Raises KeyError on an unknown
    architecture.
    """
    architecture, tgkill, numbers, starts = REFUSED[platform.machine()]
    numbers += starts if os.geteuid() == 0 else ()
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    steps = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (answer, 0, 0, 0x80000000),
        (load, 0, 0, 0),
    ]  # a call made for another architecture kills the process
    steps += [(equal, len(numbers) - i + 4, 0, number) for i, number in enumerate(numbers)]
    # refuse x32's calls; then allow tgkill, which abort() needs, to this process only
    steps += [(at_least, 4, 0, 0x40000000), (equal, 0, 2, tgkill), (load, 0, 0, 16), (equal, 0, 1, os.getpid())]
    steps += [(answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x50000 | errno.EPERM)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    prctl(PR_SET_SECCOMP, 2, struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))


def limit(job: dict[str, Any]) -> list[str]:
    """Set the resource limits, soft and hard. Returns the names of those that this system accepts."""
    wanted = {
        "memory": ("RLIMIT_AS", job["memory"]),
        "CPU": ("RLIMIT_CPU", max(1, round(job["seconds"]))),
        "core": ("RLIMIT_CORE", 0),
        "file size": ("RLIMIT_FSIZE", job["disk"]),
        "processes": ("RLIMIT_NPROC", job["processes"]),
        "open files": ("RLIMIT_NOFILE", 64),
    }
    taken = []
    for name, (constant, value) in wanted.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, constant), (value, value))
            taken.append(name)
    return taken


def confine(job: dict[str, Any], namespaces: bool) -> list[str]:
    """Put every protection around this process that the system has. Returns their names."""
    walls = ["namespaces for processes, network and files"] if namespaces else []
    folder = "/tmp" if namespaces else job["folder"]
    if namespaces:
        new_root(job["folder"], job["disk"])
    os.chdir(folder)
    if os.geteuid() == 0:
        os.chmod(folder, 0o777)
        with contextlib.suppress(PermissionError):
            become_other_user()
            walls.append("another user")
    if LINUX:  # drop the capabilities that root, or a user namespace, has
        call("capset", struct.pack("Ii", 0x20080522, 0), struct.pack("6I", 0, 0, 0, 0, 0, 0))
    if LINUX and job["landlock"]:
        with contextlib.suppress(OSError):
            walls.append(f"Landlock {landlock()}")
    limits = limit(job)
    if os.geteuid() == 0:
        limits.remove("processes")  # the kernel does not bind root to this one
    if LINUX and not namespaces:
        with contextlib.suppress(OSError, KeyError):
            filter_calls()
            walls.append("no sockets, no signals" + (", no new processes" if os.geteuid() == 0 else ""))
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # here, because changing the user clears it
    os.environ.update(HOME=folder, TMPDIR=folder)
    return [*walls, f"limits on {', '.join(limits)}"]


def execute(source: str, message: int, nonce: bytes) -> NoReturn:
    """Run the program as a module; write the nonce to `message` if it reached its last line, else the reason."""
    import types

    module, own = types.ModuleType("program"), os.getpid()
    sys.modules["program"] = module
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
        said = nonce
    except BaseException as error:  # SystemExit too: a program that leaves early has not passed
        said = f"{type(error).__name__}: {error}"[:300].encode(errors="replace")
    if os.getpid() == own:  # not in a process that the program has forked
        os.write(message, said)
    os._exit(0)


def child(job: dict[str, Any], namespaces: bool, report: int, message: int, nonce: bytes) -> NoReturn:
    """Confine this process, report, and run the program.

    Without namespaces the program runs in this process. With them this process is the namespace's init and forks: when
    the init ends, the kernel ends everything else in the namespace.
    """
    try:
        walls = confine(job, namespaces)
    except Exception as error:  # the caller will try again without namespaces
        os.write(report, json.dumps({"setup": f"{type(error).__name__}: {error}"}).encode())
        os._exit(1)
    os.write(report, json.dumps({"walls": walls}).encode())
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    kept = os.dup2(message, 3)
    os.closerange(4, 1024)
    program = os.fork() if namespaces else 0
    if program == 0:
        execute(job["source"], kept, nonce)
    while os.wait()[0] != program:
        pass
    os._exit(0)


def end(leader: int) -> None:
    """Kill the child, its process group, and what it left running.

    Without a PID namespace, processes that it left running are now children of this process.
    """
    for victim in (leader, -leader):
        with contextlib.suppress(OSError):
            os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as children:
            for pid in children.read().split():
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.002)


def main() -> None:
    """Read a job from stdin, run it, and print the result as JSON."""
    job = json.loads(sys.stdin.buffer.read())
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    (report, said), (message, written), nonce = os.pipe(), os.pipe(), secrets.token_hex(16).encode()
    os.set_blocking(message, False)
    try:
        if job["namespaces"]:
            enter_namespaces()
        else:
            prctl(PR_SET_CHILD_SUBREAPER, 1)
    except (OSError, ValueError) as error:
        print(json.dumps({"setup": str(error)}))
        return
    deadline, leader = time.monotonic() + job["seconds"], os.fork()
    if leader == 0:
        os.setpgid(0, 0)
        child(job, job["namespaces"], said, written, nonce)
    os.close(said)
    os.close(written)
    result = json.loads(os.read(report, 65536) or b"{}")
    ended = 0
    while not ended and time.monotonic() < deadline:
        ended, _ = os.waitpid(leader, os.WNOHANG)
        time.sleep(0 if ended else 0.002)
    end(leader)
    try:
        text = os.read(message, 4096)
    except BlockingIOError:
        text = b""
    timeout = None if ended else f"no end within {job['seconds']:g} s"
    killed = "killed: too much memory or CPU time, or a crash" if not text else text.decode(errors="replace")
    result.update(passed=bool(ended) and text == nonce, error=timeout or killed)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
