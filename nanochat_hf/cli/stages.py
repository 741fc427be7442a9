"""Stages of a long command, each in a process of its own. What it prints becomes a screen: plan, one bar, result."""

import contextlib
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat_hf.training.tracking import read_metrics

INTERRUPTED = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # exit codes of a stage that was asked to stop
# a line of training on no terminal, or a bar of tqdm
BAR = re.compile(r"step \d+/\d+ \((\d+)%\)|(\d+)%\|")


@dataclass(frozen=True)
class Stage:
    """One command and what it leaves.

    `makes`: there once the stage is finished. `draft`: what the command writes, where that is not whole at once; it
    becomes `makes`.
    `steps`: optimizer steps, 0 where nothing is trained; `metrics`: the file in which they are recorded. `seconds`:
    everything but steps,
    on a machine whose step takes REFERENCE_STEP seconds (see quickstart.py).
    """

    name: str
    module: str
    argv: tuple[str, ...]
    makes: Path
    draft: Path | None = None
    steps: int = 0
    metrics: Path | None = None
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        """Whether the stage was finished, now or by an earlier call."""
        return self.makes.exists()

    def step_times(self) -> tuple[int, list[float]]:
        """(steps done, seconds of each recorded step), from the run's metrics; (0, []) where there are none yet."""
        if self.metrics is None or not self.metrics.is_file():
            return 0, []
        entries = [entry for entry in read_metrics(self.metrics) if "train/step_seconds" in entry]
        times = [entry["train/step_seconds"] for entry in entries]
        return max((entry["step"] for entry in entries), default=0), times


class Screen:
    """Shows the output of a stage: lines as they come, a bar in place on a terminal and elsewhere a line a tenth of it.

    `log`: a file for all of it, None for none.
    """

    def __init__(self, log: Path | None = None, terminal: bool | None = None):
        self.terminal = sys.stdout.isatty() if terminal is None else terminal
        self.log, self.rest, self.tenths, self.drawn = log, "", 0, False

    def feed(self, data: bytes) -> None:
        """Take in what the stage has printed; the last line waits until it has an end."""
        text = data.decode("utf-8", "replace")
        with contextlib.suppress(OSError):  # a log that cannot be written ends no training
            if self.log:
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(text)
        *lines, self.rest = re.split(r"[\r\n]", self.rest + text)
        for line in lines:
            if bar := BAR.search(line):
                self._bar(line.strip(), int(bar[1] or bar[2]) // 10)
            elif line.strip():
                self.say(line.rstrip())

    def say(self, line: str) -> None:
        """A whole line, above the bar."""
        print(("\r\033[K" if self.drawn else "") + line, flush=True)
        self.drawn = False

    def close(self) -> None:
        """End the bar's line."""
        if self.rest.strip():
            self.say(self.rest.rstrip())
        elif self.drawn:
            print(flush=True)
        self.rest, self.drawn = "", False

    def _bar(self, line, tenths):
        if self.terminal:
            print("\r\033[K" + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)
            self.drawn = True
        elif tenths > self.tenths:
            print(line, flush=True)
        self.tenths = tenths


class Processes:
    """Runs commands in processes that need no second import: a fork server has made it, where the platform has one."""

    def __init__(self, preload: Sequence[str]):
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        self.context = multiprocessing.get_context("forkserver") if forks else multiprocessing.get_context("spawn")
        if forks:
            self.context.set_forkserver_preload(list(preload))

    def warm_up(self) -> None:
        """Start the fork server, which imports while this process goes on."""
        if self.context.get_start_method() == "forkserver":
            from multiprocessing.forkserver import ensure_running

            ensure_running()

    def run(self, module: str, argv: Sequence[str], screen: Screen, tick: Callable[[], None] = lambda: None) -> int:
        """Exit code of `module.main(argv)`, whose output goes to `screen`; `tick` is called about twice a second.

        Ctrl-C is passed on, once: training then finishes its step and saves. A second one ends the process.
        """
        reader, writer = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_child, args=(module, list(argv), reader, writer))
        process.start()
        writer.close()
        asked = 0
        while True:
            try:
                ended = process.exitcode is not None  # looked at before reading, so that nothing stays unread
                data = os.read(reader.fileno(), 65536) if reader.poll(0 if ended else 0.5) else None
                if data:
                    screen.feed(data)
                elif ended or data is not None:
                    break
                tick()
            except KeyboardInterrupt:
                asked += 1
                screen.say("stopping after this step; Ctrl-C again ends at once" if asked == 1 else "ended")
                if process.pid is not None and process.is_alive():
                    os.kill(process.pid, signal.SIGINT if asked == 1 else signal.SIGKILL)
        process.join()
        screen.close()
        return 130 if asked or process.exitcode is None else process.exitcode


def _child(module, argv, reader, writer):
    # `reader` stays open here, so that writing fails at no moment after the parent's end: training still has to save
    os.setpgrp()  # a terminal's Ctrl-C reaches the parent alone, which passes it on
    for number in (1, 2):
        os.dup2(writer.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False, encoding="utf-8") for n in (1, 2))
    sys.argv = [module, *argv]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    importlib.import_module(module).main(argv)
    del reader


def _end_with_parent():
    if parent := multiprocessing.parent_process():
        parent.join()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.kill(os.getpid(), signal.SIGTERM)


def seconds_left(stages: Sequence[Stage], current: Stage, each: float, reference: float) -> dict[str, float]:
    """{stage: seconds still to go} for `current`, a step of which takes `each` seconds, and for those after it.

    A step of a later stage is taken to last as long, and everything else to be slower or faster than on the machine
    whose step takes
    `reference` seconds in the same proportion.
    """
    left = {current.name: each * (current.steps - current.step_times()[0])}
    for stage in stages[stages.index(current) + 1 :]:
        if not stage.done:
            left[stage.name] = each * stage.steps + stage.seconds * each / reference
    return left
