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
import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["nanochat_hf.cli.chat_sft", "datasets", "torch.distributed"])
STEPS, PATIENCE = 10, 120.0  # steps of a run; seconds after which one that neither ends nor dies counts as hanging
# how often a kind comes: what users meet most comes most
SHARES = {"kill": 8, "stop": 3, "disk": 3, "two": 2, "bit": 3, "drop": 1}
OF_TIME = ("seconds", "per_second", "mfu")


class Difference(Exception):
    """What a round left is not what the uninterrupted run leaves."""


def build_inputs(folder: Path) -> None:
    """A tiny model and its conversations."""
    import torch

    from nanochat_hf import NanochatConfig, NanochatForCausalLM
    from nanochat_hf.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["The cat counted 12 letters, then 7 more."] * 3, 280)
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = NanochatConfig(
        vocab_size=280,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        **ids,
    )
    NanochatForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} " * (i % 7 + 1)}]
        for i in range(120)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # two thirds are words that nothing trains: validation falls, then rises, so that the best model is not the last
    answer = {"role": "assistant", "content": "The cat counted letters. 3 3 3 3 3 3"}
    words = [{"role": "user", "content": "say 3"}, answer]
    (folder / "held_out.jsonl").write_text(json.dumps(words) + "\n")


def flags(inputs: Path, output: Path, world: int) -> list[str]:
    """A run that evaluates, keeps the best model and saves every other step.

    Rates so high that validation goes up and down.
    """
    given = {
        "model": inputs / "model",
        "data": inputs / "chats.jsonl",
        "validation": inputs / "held_out.jsonl",
        "output-dir": output,
        "resume": "auto",
        "num-steps": STEPS,
        "max-seq-len": 64,
        "device-batch-size": 4 // world,
        "total-batch-size": 4 * 64,
        "eval-every": 2,
        "eval-batches": 1,
        "save-every": 2,
        "keep": 3,
        "keep-best": True,
        "log-every": 1,
        "matrix-lr": 0.3,
        "embedding-lr": 1.0,
        "warmdown-ratio": 0,
        "dtype": "float32",
        "attn": "sdpa",
        "compile": False,
    }
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)]


def child(argv: list[str], log: str, environment: dict[str, str], limit: int | None) -> None:
    """scripts.chat_sft in a fresh process, with its output in `log`; `limit`: bytes beyond which no file grows."""
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    import torch

    from nanochat_hf.cli.chat_sft import main

    torch.set_num_threads(1)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    main(argv)


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Attempt:
    """A run of `world` processes that has been started."""

    def __init__(self, inputs: Path, output: Path, log: Path, world: int = 1, limit: int | None = None):
        self.log, self.processes = log, []
        shared = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        port = str(free_port())
        for rank in range(world):
            own = dict(shared)
            if world > 1:
                own |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "RANK": str(rank)}
                own |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            arguments = (flags(inputs, output, world), str(log), own, limit)
            self.processes.append(CONTEXT.Process(target=child, args=arguments))
            self.processes[-1].start()

    def send(self, number: int, rank: int | None = None) -> None:
        """A signal to one process, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def alive(self) -> bool:
        """Whether any process still runs."""
        return any(process.is_alive() for process in self.processes)

    def wait(self, seconds: float) -> None:
        """Until the run ends, at most so long."""
        deadline = time.monotonic() + seconds
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.005)

    def codes(self) -> list[int]:
        """Exit codes; Difference where the run hangs."""
        self.wait(PATIENCE)
        if self.alive():
            self.send(signal.SIGKILL)
            raise Difference(f"it hangs; it printed\n{self.text()[-2000:]}")
        return [process.exitcode for process in self.processes]

    def text(self) -> str:
        """All that was printed."""
        return self.log.read_text() if self.log.exists() else ""


def left_by(output: Path) -> dict[str, object]:
    """What a finished run leaves, time and speed aside."""
    import torch
    from safetensors.torch import load_file

    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    report = (output / "report.md").read_text().partition("## Settings")[0].splitlines()
    found: dict[str, object] = {
        "metrics": [{k: v for k, v in e.items() if not k.endswith(OF_TIME)} for e in entries],
        "report": [line for line in report if line.startswith("|") and "seconds" not in line and "tok/s" not in line],
        "names": sorted(path.name for path in output.iterdir() if not path.name.endswith(".damaged")),
    }
    for part in ("final", "best"):
        weights = load_file(output / part / "model.safetensors")
        found[part] = {name: value.view(torch.uint8).numpy().tobytes() for name, value in weights.items()}
    return found


@dataclass
class Drill:
    """The rounds of one drill: inputs, what the uninterrupted runs left, the seconds that they took, and the tally."""

    inputs: Path
    root: Path
    expected: dict[int, dict[str, object]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    tally: dict[str, Counter] = field(default_factory=lambda: {kind: Counter() for kind in SHARES})

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
        kind = dice.choices(list(SHARES), list(SHARES.values()))[0]
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


NAMES = ("tried", "survived", "identical")


def main() -> None:
    """Drill for --minutes, print the table, write the record; exit code 1 at the first difference."""
    parser = argparse.ArgumentParser(description="Interrupt runs in every way, and compare what they leave.")
    parser.add_argument("--minutes", type=float, default=15.0, help="how long")
    parser.add_argument("--workers", type=int, default=2, help="rounds at a time")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="seed of all dice (default: the time)")
    parser.add_argument("--record", default=None, help="folder of the record, docs/records/drill (default: none)")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="drill-"))
    drill = Drill(root, root)
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
        from nanochat_hf.tools.record import Table, write_record

        columns = {"kind": None, "tried": "rounds", "survived": "rounds", "identical": "rounds"}
        write_record(args.record, {"rounds": Table("Rounds of the drill, by kind", columns, rows)})


if __name__ == "__main__":
    main()
