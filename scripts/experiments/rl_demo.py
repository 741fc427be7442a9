"""What reinforcement learning does for the quickstart's model, on a CPU, over seeds: make rl-demo.

The model was fine-tuned to spell words. Spelling strings of random letters asks the same of it, and it does it half of
the time. Rewards alone, without an example, make it better at that. Each seed is a run of scripts.chat_rl with
scripts/recipes/rl_demo.yaml; before and after, held-out strings and the old skills are measured greedily. The seeds run
side by side, one on a core.

python -m scripts.experiments.rl_demo --model runs/quickstart/sft/final --seeds 0,1,2
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_hf.config import parse, user_errors
from nanochat_hf.machine.cpu import available_cores
from nanochat_hf.tools.record import Table, write_record
from nanochat_hf.training.tracking import read_metrics

RECIPE = Path(__file__).parents[1] / "recipes" / "rl_demo.yaml"
NEW, OLD = "random_spelling", ("simple_spelling", "spelling_bee", "calculator", "identity")
Accuracies = Mapping[str, tuple[float, float]]  # {task: (accuracy, standard error)}


@dataclass(frozen=True)
class DemoConfig:
    """From which model, over which seeds, and where to."""

    model: str = field(default="runs/quickstart/sft/final", metadata={"help": "folder of the quickstart's model"})
    output_dir: str = field(default="runs/rl-demo", metadata={"help": "folder of the runs, one for each seed"})
    seeds: str = field(default="0,1,2", metadata={"help": "seeds, with commas"})
    num_steps: int | None = field(default=None, metadata={"help": "optimizer steps of a run (default: the recipe's)"})
    limit: int = field(default=200, metadata={"help": "held-out questions of each task"})
    processes: int | None = field(default=None, metadata={"help": "runs at a time (default: one for each core)"})
    record: str | None = field(default=None, metadata={"help": "write a record, such as docs/records/rl-demo"})


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run all seeds, print the table, draw the curves; SystemExit where a run fails."""
    config, _ = parse([DemoConfig], argv, description=__doc__)
    if not (Path(config.model) / "config.json").is_file():
        raise ValueError(f"--model {config.model}: no model there; make it with make quickstart")
    seeds, root, start = [int(seed) for seed in config.seeds.split(",")], Path(config.output_dir), time.perf_counter()
    root.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(config.processes or available_cores()) as pool:
        before = pool.submit(accuracies, Path(config.model), root / "before.json", config.limit)
        runs = [pool.submit(one_seed, config, seed) for seed in seeds]
        results = {seed: run.result() for seed, run in zip(seeds, runs, strict=True)}
    curves = {seed: rewards(root / str(seed)) for seed in seeds}
    print(report(before.result(), results, time.perf_counter() - start), flush=True)
    if draw(curves, root / "curves.png"):
        print(f"curves: {root / 'curves.png'}")
    if config.record:
        print(f"record: {record(config.record, before.result(), results, curves)}")


def one_seed(config: DemoConfig, seed: int) -> Accuracies:
    """A run and its evaluation; a second call goes on, or finds them done."""
    folder = Path(config.output_dir) / str(seed)
    steps = ["--num-steps", str(config.num_steps)] if config.num_steps else []
    if not (folder / "final").is_dir():
        flags = ["--config", str(RECIPE), "--model", config.model, "--output-dir", str(folder), "--seed", str(seed)]
        command("nanochat_hf.cli.chat_rl", [*flags, *steps], folder.with_suffix(".log"))
    return accuracies(folder / "final", folder / "after.json", config.limit)


def accuracies(model: Path, output: Path, limit: int) -> Accuracies:
    """Held-out accuracy of all tasks, greedy."""
    if not output.is_file():
        tasks = ",".join((NEW, *OLD))
        flags = ["--model", str(model), "--tasks", tasks, "--limit", str(limit), "--batch-size", str(limit)]
        command(
            "nanochat_hf.cli.chat_eval",
            [*flags, "--max-new-tokens", "192", "--dtype", "float32", "--output", str(output)],
            output.with_suffix(".log"),
        )
    return {task["name"]: (task["accuracy"], task["stderr"]) for task in json.loads(output.read_text())["tasks"]}


def command(module: str, flags: list[str], log: Path) -> None:
    """Run a command on one thread of the CPU, its output to `log`; ValueError where it fails."""
    threads = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | threads | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, "-m", module, *flags], env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    if done.returncode:
        last = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(f"{module} failed ({last}); all of its output: {log}")


def rewards(folder: Path) -> list[tuple[int, float, float]]:
    """(step, mean reward of the sampled answers, seconds since the start) of a run."""
    found, seconds = [], 0.0
    for entry in read_metrics(folder / "metrics.jsonl"):
        if "reward" in entry:
            seconds += entry["step_time"]
            found.append((entry["step"], entry["reward"], seconds))
    return found


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; 0 for a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def report(before: Accuracies, after: Mapping[int, Accuracies], seconds: float) -> str:
    """Accuracies before and after as a table, with standard errors over questions before and over seeds after."""
    lines = [
        f"{seconds:.0f} s, seeds {', '.join(map(str, after))}",
        "| task | before | after | change |",
        "|---|---|---|---|",
    ]
    for task in (NEW, *OLD):
        (accuracy, error), (mean, spread) = before[task], over_seeds([found[task][0] for found in after.values()])
        lines.append(f"| {task} | {accuracy:.1%} ± {error:.1%} | {mean:.1%} ± {spread:.1%} | {mean - accuracy:+.1%} |")
    return "\n".join(lines)


def draw(curves: Mapping[int, Sequence[tuple[int, float, float]]], path: Path) -> bool:
    """The reward over the steps of each seed as a picture; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(5.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for seed, points in curves.items():
        axes.plot([step for step, *_ in points], [reward for _, reward, _ in points], label=f"seed {seed}")
    axes.set(title="Spelling random letters", xlabel="step", ylabel="reward of sampled answers", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    return True


def record(folder: str, before: Accuracies, after: Mapping[int, Accuracies], curves: Mapping[int, Any]) -> Path:
    """Write the tables of a record, and the picture."""
    columns: dict[str, str | None] = {"task": None, "seed": None, "before": "%", "after": "%"}
    rows: list[list[Any]] = [
        [task, seed, round(100 * before[task][0], 1), round(100 * found[task][0], 1)]
        for task in (NEW, *OLD)
        for seed, found in after.items()
    ]
    names: dict[str, str | None] = {"seed": None, "step": None, "reward": None, "time": "s"}
    steps: list[list[Any]] = [
        [seed, step, round(reward, 4), round(seconds, 1)]
        for seed, points in curves.items()
        for step, reward, seconds in points
    ]
    written = write_record(
        folder,
        {
            "accuracy": Table("Held-out accuracy, greedy, before and after", columns, rows),
            "curves": Table("Mean reward of sampled answers by step", names, steps),
        },
    )
    draw(curves, written / "curves.svg")
    return written


if __name__ == "__main__":
    main()
