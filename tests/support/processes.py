"""Runs a script's main, a file, or a function on each of several ranks, in fresh processes.

A fork server has the heavy imports ready, so a start takes a tenth of a second instead of the ten seconds of CPU that
the imports take. Its children leave by os._exit: in an interpreter that shuts down, threads of gloo can still hold
tensors, and torch then sometimes aborts the process after all its work is done.
"""

import contextlib
import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
DRAWING = "matplotlib.backends.backend_agg"  # of a finished run's report, where it is installed
SCRIPTS = ("chat_sft", "chat_rl", "base_train", "chat_eval", "push_dataset", "push_to_hub")
CONTEXT.set_forkserver_preload([*(f"scripts.{name}" for name in SCRIPTS), "datasets", "torch.distributed", DRAWING])


def _child(module, argv, environment, log, limit, folder):
    os.environ.update(environment)
    if "HF_ENDPOINT" in environment:
        _read_environment_again()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.chdir(folder)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    sys.argv = [module, *argv]
    import torch

    torch.set_num_threads(1)
    if limit:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__")


def _read_environment_again():
    """Let the libraries find another Hub and another cache.

    They read the environment when they are imported, which the server has done.
    """
    import datasets.config
    import huggingface_hub.constants

    importlib.reload(huggingface_hub.constants)
    importlib.reload(datasets.config)


def free_port():
    """A TCP port that nothing listens on now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _ranks(rank, world, port):
    """The environment of one of several ranks; none for one alone."""
    if world == 1:
        return {}
    return {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _call(rank, function, world, port, args):
    os.environ.update({"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"} | _ranks(rank, world, port))
    import torch

    torch.set_num_threads(1)
    function(rank, world, *args)


def on_ranks(function, world, *args):
    """`function(rank, world, *args)` in each of `world` processes; raises what one of them raises.

    torch.distributed and Accelerate read the environment of these processes.
    """
    from torch.multiprocessing import start_processes

    start_processes(_call, args=(function, world, free_port(), args), nprocs=world, start_method="forkserver")


class Run:
    """`world` processes of `python -m module argv`, or of `python file.py argv`, on the CPU.

    `log` holds what they print.
    """

    def __init__(self, module, argv, log, world=1, environment=None, limit=None, folder="."):
        port = free_port()
        # many small runs, some of them "endless": compiling each would take half a minute
        base = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", **(environment or {})}
        self.log, self.processes = Path(log), []
        for rank in range(world):
            own = base | _ranks(rank, world, port)
            self.processes.append(
                CONTEXT.Process(target=_child, args=(module, [str(a) for a in argv], own, str(log), limit, str(folder)))
            )
            self.processes[-1].start()

    def wait(self, timeout=280):
        """Exit codes, rank by rank; a run that hangs is killed and fails the test."""
        for process in self.processes:
            process.join(timeout)
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            self.kill()
            raise AssertionError(f"the run did not end; it printed\n{self.text()[-3000:]}")
        return codes

    def kill(self, number=signal.SIGKILL):
        """Send a signal to every rank."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def text(self):
        """All that was printed."""
        return self.log.read_text() if self.log.exists() else ""
