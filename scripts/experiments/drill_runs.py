"""The runs of the drill: a tiny model and its conversations, a run in a process of its own, and what it leaves."""

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["nanochat_hf.cli.chat_sft", "datasets", "torch.distributed"])
STEPS, PATIENCE = 10, 120.0  # steps of a run; seconds after which one that neither ends nor dies counts as hanging
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
