"""Runs that are killed, stopped, refused room, damaged and started twice, hundreds of times.

python -m scripts.experiments.drill --minutes 15

Each round trains a tiny model, does one thing to the run at a random moment, lets it go on with --resume auto, and
compares what it leaves with the uninterrupted run: the final and the best model bit for bit, metrics.jsonl and the
report's results, time and speed aside. The first difference ends the drill with exit code 1 and keeps the round's
folder. Prints tried, survived and identical per kind, and writes them as a record.

- kill: SIGKILL, up to three times
- stop: SIGTERM, which saves and leaves with 143
- disk: no file may grow beyond a random size until the run is resumed
- two: a second run is started in the folder of the first
- bit: a random bit of a random file of the newest checkpoint is flipped after a kill
- drop: of two processes that train together one is killed
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from nanochat_hf.tools.record import Table, write_record

from .drill_runs import Attempt, Difference, build_inputs, left_by

# how often a kind comes: what users meet most comes most
SHARES = {"kill": 8, "stop": 3, "disk": 3, "two": 2, "bit": 3, "drop": 1}
NAMES = ("tried", "survived", "identical")


@dataclass
class Drill:
    """The rounds of one drill: inputs, what the uninterrupted runs left, the seconds that they took, and the tally."""

    inputs: Path
    root: Path
    shares: dict[str, int]
    expected: dict[int, dict[str, object]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    tally: dict[str, Counter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tally = {kind: Counter() for kind in self.shares}

    def prepare(self) -> None:
        """Train without interruption, on one process and on two."""
        for world in (1, 2):
            start, output = time.monotonic(), self.root / f"whole-{world}"
            run = Attempt(self.inputs, output, self.root / f"whole-{world}.log", world)
            if run.codes() != [0] * world:
                raise Difference(f"the uninterrupted run on {world} processes failed:\n{run.text()[-2000:]}")
            self.seconds[world], self.expected[world] = time.monotonic() - start, left_by(output)

    def round(self, number: int, seed: int) -> None:
        """One round; Difference where it does not end as it should."""
        dice = random.Random(f"{seed}-{number}")
        kind = dice.choices(list(self.shares), list(self.shares.values()))[0]
        folder = self.root / f"{number:05d}-{kind}"
        folder.mkdir()
        self.tally[kind]["tried"] += 1
        world = 2 if kind == "drop" else 1
        try:
            getattr(self, f"_{kind}")(folder, dice)
            self._finish(folder, world, kind)
            self.tally[kind]["survived"] += 1
            found = left_by(folder / "run")
            for name, value in self.expected[world].items():
                if found[name] != value:
                    raise Difference(f"{name} differs from the uninterrupted run's")
            self.tally[kind]["identical"] += 1
        except (Difference, OSError, ValueError, KeyError) as error:
            raise Difference(f"round {number} ({kind}, seed {seed}) in {folder}: {error}") from error
        shutil.rmtree(folder)

    def _start(self, folder: Path, name: str, world: int = 1, limit: int | None = None) -> Attempt:
        return Attempt(self.inputs, folder / "run", folder / f"{name}.log", world, limit)

    def _finish(self, folder, world, kind):
        # the last attempt: nothing disturbs it
        run = self._start(folder, "last", world)
        codes = run.codes()
        if codes != [0] * world or "Traceback" in run.text():
            raise Difference(f"the resumed run left with {codes}; it printed\n{run.text()[-2000:]}")

    def _moment(self, dice, world=1):
        return dice.uniform(0, 1.1 * self.seconds[world])

    def _kill(self, folder, dice):
        for attempt in range(dice.randint(1, 3)):
            run = self._start(folder, f"kill-{attempt}")
            run.wait(self._moment(dice))
            run.send(signal.SIGKILL)
            run.codes()

    def _stop(self, folder, dice):
        run = self._start(folder, "stop")
        run.wait(self._moment(dice))
        run.send(signal.SIGTERM)
        code = run.codes()[0]
        # before and after training the signal ends the program as it ends any
        if code not in (0, 143, -signal.SIGTERM) or "Traceback" in run.text():
            raise Difference(f"a stopped run left with {code}; it printed\n{run.text()[-2000:]}")

    def _disk(self, folder, dice):
        run = self._start(folder, "disk", limit=int(10 ** dice.uniform(4.3, 6.2)))
        code = run.codes()[0]
        lines = [line for line in run.text().splitlines() if line.startswith("error: ")]
        if code not in (0, 2) or (code == 2 and len(lines) != 1) or "Traceback" in run.text():
            raise Difference(f"a full disk left with {code}; it printed\n{run.text()[-2000:]}")

    def _two(self, folder, dice):
        first = self._start(folder, "first")
        first.wait(self._moment(dice))
        second = self._start(folder, "second")
        codes = sorted(first.codes() + second.codes())
        text = first.text() + second.text()
        refused = text.count("another run writes there")
        # where the first has ended the second finds a finished run, and ends too
        if codes != ([0, 2] if refused else [0, 0]) or refused > 1 or "Traceback" in text:
            raise Difference(f"two runs left with {codes}; they printed\n{text[-3000:]}")

    def _bit(self, folder, dice):
        run = self._start(folder, "bit")
        run.wait(dice.uniform(0.4, 1.1) * self.seconds[1])
        run.send(signal.SIGKILL)
        run.codes()
        found = sorted((folder / "run").glob("checkpoint-0*"))
        if len(found) < 2:  # nothing, or nothing to go back to
            return
        path = dice.choice(sorted(path for path in found[-1].iterdir() if path.stat().st_size))
        content = bytearray(path.read_bytes())
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
        again = self._start(folder, "again")
        code = again.codes()[0]
        if code != 0 or f"{found[-1].name} is damaged" not in again.text():
            raise Difference(f"a flipped bit of {path.name} left with {code}; it printed\n{again.text()[-2000:]}")

    def _drop(self, folder, dice):
        run = self._start(folder, "drop", world=2)
        run.wait(self._moment(dice, 2))
        run.send(signal.SIGKILL, rank=dice.randrange(2))
        run.wait(15)
        run.send(signal.SIGKILL)  # as the launcher does, where the other still waits for its partner
        run.codes()


def rounds(drill: Drill, minutes: float, workers: int, seed: int) -> None:
    """Rounds until the time is over, `workers` at a time; raises the first Difference."""
    deadline, numbers = time.monotonic() + 60 * minutes, iter(range(10**6))

    def work():
        while time.monotonic() < deadline and not failed:
            try:
                drill.round(next(numbers), seed)
            except Difference as error:
                failed.append(error)

    failed: list[Difference] = []
    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(work) for _ in range(workers)]:
            future.result()
    if failed:
        raise failed[0]


def table(tally: dict[str, Counter]) -> list[list[object]]:
    """Rows of kind, tried, survived, identical; the last is the sum."""
    rows: list[list[object]] = [[kind, *(counts[n] for n in NAMES)] for kind, counts in tally.items()]
    return [*rows, ["all", *(sum(counts[n] for counts in tally.values()) for n in NAMES)]]


def main() -> None:
    """Drill for --minutes, print the table, write the record; exit code 1 at the first difference."""
    parser = argparse.ArgumentParser(description="Interrupt runs in every way, and compare what they leave.")
    parser.add_argument("--minutes", type=float, default=15.0, help="how long")
    parser.add_argument("--workers", type=int, default=2, help="rounds at a time")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="seed of all dice (default: the time)")
    parser.add_argument(
        "--kinds", nargs="+", choices=SHARES, default=list(SHARES), help="kinds of rounds (default: all)"
    )
    parser.add_argument("--record", default=None, help="folder of the record, docs/records/drill (default: none)")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="drill-"))
    drill = Drill(root, root, {kind: SHARES[kind] for kind in args.kinds})
    build_inputs(root)
    start, failed = time.monotonic(), None
    try:
        drill.prepare()
        rounds(drill, args.minutes, args.workers, args.seed)
    except Difference as error:
        failed = error
    rows = table(drill.tally)
    print(f"{'kind':<8}", *(f"{name:>10}" for name in NAMES))
    for kind, *counts in rows:
        print(f"{kind:<8}", *(f"{count:>10}" for count in counts))
    print(f"seed {args.seed}, {(time.monotonic() - start) / 60:.1f} min, {args.workers} at a time", flush=True)
    if failed:
        sys.exit(f"drill failed: {failed}")
    shutil.rmtree(root)
    if args.record:
        columns = {"kind": None, "tried": "rounds", "survived": "rounds", "identical": "rounds"}
        write_record(args.record, {"rounds": Table("Rounds of the drill, by kind", columns, rows)})


if __name__ == "__main__":
    main()
