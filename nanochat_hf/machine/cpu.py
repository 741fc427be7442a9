"""How many threads help on this CPU, and whether half precision is faster than float32 there: measured, not looked up.

A table of processors ages, and the instruction set does not say what is fast. Without AVX-512 or AMX a bfloat16 product
takes some ten times as long as a float32 one, with AMX a fraction of it. When another program holds one of two cores,
two threads are slower than one. So a product of the model's own shape is timed, once a process.
"""

import functools
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

# How much faster a bfloat16 product must be than a float32 one: autocast also casts every weight, once a forward.
WORTH = 1.3
FEWER_WIN = 0.95  # fewer threads are taken where a round takes at most this share of the time that more threads need
TOO_SLOW = 1.0  # GFLOP/s below which training is not worth starting
EFFICIENCY = 0.4  # FLOP/s of a whole training step as a share of one product's, measured at depths 2 to 4 on two cores
WORK = 5e7  # FLOPs of one timed product: about 1 ms of float32 on one core, 10 ms of bfloat16 that is emulated
ROWS = 128  # of the timed product
WIDTH = 256  # channels of a model where none is known yet
PATIENCE = 0.02  # seconds spent on one number of threads, and on one precision


@dataclass(frozen=True)
class Speed:
    """GFLOP/s of a product in either precision."""

    float32: float
    bfloat16: float

    @property
    def ratio(self) -> float:
        """How many times as fast bfloat16 products are."""
        return self.bfloat16 / self.float32

    @property
    def best(self) -> str:
        """float32 or bfloat16: the dtype that products are taken in where nothing else was asked for."""
        return "bfloat16" if self.ratio >= WORTH else "float32"

    @property
    def gflops(self) -> float:
        """GFLOP/s in the better precision."""
        return max(self.float32, self.bfloat16)

    def describe(self) -> str:
        """The choice and its reason, for a plan.

        >>> Speed(60.0, 7.2).describe()
        'float32: bfloat16 products are 0.12 times as fast here (7.2 against 60 GFLOP/s)'
        """
        figures = f"{self.bfloat16:.3g} against {self.float32:.3g} GFLOP/s"
        return f"{self.best}: bfloat16 products are {self.ratio:.2g} times as fast here ({figures})"


@dataclass(frozen=True)
class Threads:
    """The number of threads in use, and how many milliseconds a round of work took with each number tried."""

    count: int
    rounds: dict[int, float] = field(default_factory=dict)

    def describe(self) -> str:
        """The choice and its reason, for a plan.

        >>> Threads(1, {1: 1.5, 2: 5.5}).describe()
        '1 (a round of work takes 1.5 ms with 1, 5.5 ms with 2)'
        """
        tried = ", ".join(f"{milliseconds:.1f} ms with {count}" for count, milliseconds in self.rounds.items())
        return f"{self.count} (a round of work takes {tried})" if len(self.rounds) > 1 else f"{self.count}"


def available_cores(root: Path = Path("/sys/fs/cgroup"), group: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may use, by its affinity and by the quota of its control group, which torch ignores.

    A container of two cores on a machine with 64 gets 64 threads from torch, which then wait for each other.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_quota(folder) for folder in _control_groups(root, group)]
    return max(1, min([cores, *(int(quota + 0.5) for quota in quotas if quota)]))


def _control_groups(root, group):
    # version 2 has one line, 0::/path, version 1 a line for each controller; in a container the root is often the group
    folders = [root, root / "cpu"]
    try:
        for line in group.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "cpu" in controllers.split(","):
                base = root if controllers == "" else root / "cpu"
                parts = Path(path).parts[1:]
                folders += [base.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    except (OSError, ValueError):
        pass
    return folders


def _quota(folder):
    # cores as a fraction, None where there is no limit
    try:
        if (folder / "cpu.max").is_file():
            allowed, period = (folder / "cpu.max").read_text().split()
        else:
            allowed, period = (folder / "cpu.cfs_quota_us").read_text(), (folder / "cpu.cfs_period_us").read_text()
        return None if allowed.strip() in ("max", "-1") else int(allowed) / int(period)
    except (OSError, ValueError):
        return None


def local_processes() -> int:
    """Processes of this run on this host, as the launcher says."""
    for name in ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if os.environ.get(name, "").isdigit():
            return max(1, int(os.environ[name]))
    return 1


def thread_choices() -> list[int]:
    """Numbers of threads worth trying, ascending: one, half and all of this process's share of the cores.

    A number that the user gave, as OMP_NUM_THREADS or num_cpu_threads_per_process, is the only one. Accelerate's
    launcher always sets OMP_NUM_THREADS; its default, the physical cores divided by the processes, is an upper bound.
    """
    share = max(1, available_cores() // local_processes())
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdigit() and int(said) > 0:
        if not _launched() or int(said) != _launchers_default():
            return [int(said)]
        share = min(share, int(said))
    return sorted({1, max(1, share // 2), share})


def _launched():
    return "ACCELERATE_MIXED_PRECISION" in os.environ


def _launchers_default():
    import psutil  # one of Accelerate's own needs

    return max(1, (psutil.cpu_count(logical=False) or 1) // local_processes())


@functools.cache
def measure(kind: str = "cpu", width: int = WIDTH) -> Speed:
    """Time products of a model `width` channels wide, (n, C)·(C, m), on a device of this kind ("cpu" or "mps").

    Takes 0.1 s, once a process.
    """
    speeds = {}
    for dtype in (torch.float32, torch.bfloat16):
        call, flops = _product(kind, width, dtype)
        speeds[dtype] = flops / _seconds_a_call(call, min) / 1e9
    return Speed(speeds[torch.float32], speeds[torch.bfloat16])


@functools.cache
def set_threads(count: int | None = None) -> Threads:
    """Set torch's number of threads and return it, with what was measured. Takes 0.1 s, once a process.

    `count`: the number wanted, at most the cores there are: by it a resumed run adds its sums in the same order. None:
    the number that is fastest now (see thread_choices).
    """
    choices = thread_choices() if count is None else [min(count, available_cores())]
    rounds = {}
    for threads in choices if len(choices) > 1 else []:
        torch.set_num_threads(threads)
        rounds[threads] = 1e3 * _seconds_a_call(_round(), statistics.fmean)
    chosen = fewest_that_win(rounds) if rounds else choices[0]
    torch.set_num_threads(chosen)
    return Threads(chosen, rounds)


def fewest_that_win(rounds: dict[int, float]) -> int:
    """The number of threads with the shortest round. Fewer threads must be clearly faster.

    >>> fewest_that_win({1: 5.0, 2: 5.1}), fewest_that_win({1: 1.5, 2: 5.5})
    (2, 1)
    """
    best = max(rounds)
    for count in sorted(rounds, reverse=True):
        if rounds[count] <= FEWER_WIN * rounds[best]:
            best = count
    return best


def _product(kind, width, dtype):
    # (call, FLOPs): the model's own inner size, and as many of the 4C columns as keep the work small whatever the width
    columns = max(16, min(4 * width, round(WORK / (2 * ROWS * width))))
    x, w = torch.ones(ROWS, width, device=kind, dtype=dtype), torch.ones(columns, width, device=kind, dtype=dtype)

    def call():
        result = x @ w.mT
        if kind == "mps":
            torch.mps.synchronize()
        return result

    return call, 2 * ROWS * width * columns


def _round():
    # a product and an elementwise region, as in a layer: at the end of each the threads wait for the slowest one
    product, _ = _product("cpu", WIDTH, torch.float32)
    x = torch.ones(ROWS, 4 * WIDTH)

    def call():
        product()
        torch.relu(x).square_()

    return call


def _seconds_a_call(call, statistic):
    call()  # what is made once: threads, packed weights
    times, start = [], time.perf_counter()
    while len(times) < 2 or time.perf_counter() - start < PATIENCE:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
        if times[-1] > PATIENCE:
            break
    return statistic(times)


def best_dtype(device: torch.device, width: int = WIDTH) -> str:
    """The dtype for products on `device` where nobody said one: float32 or bfloat16.

    All processes of a run get the answer of the first.
    """
    if device.type not in ("cpu", "mps"):
        return "bfloat16"
    best = [measure(device.type, width).best]
    if PartialState._shared_state and PartialState().num_processes > 1:
        broadcast_object_list(best)
    return best[0]


def training_seconds(flops: float, speed: Speed) -> float:
    """Seconds that training of so many FLOPs is expected to take at EFFICIENCY of the measured product's speed."""
    return flops / (speed.gflops * 1e9 * EFFICIENCY)


def too_slow(speed: Speed) -> str | None:
    """One sentence where this CPU is too slow to train on; None elsewhere."""
    if speed.gflops >= TOO_SLOW:
        return None
    return f"this CPU reaches {speed.gflops:.2g} GFLOP/s in its better precision; training wants at least {TOO_SLOW:g}"
