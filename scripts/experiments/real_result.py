"""Fine-tuning beside the reference's way, from one base model and on one budget.

python -m scripts.experiments.real_result --model runs/base/final --output-dir runs/real [--data-root ../shared/data]
[--num-steps 100]

The base model is evaluated, fine-tuned twice (on the assistant's tokens with packed conversations kept apart; and on
all tokens with packs that see each other, as the reference does), and both results are evaluated and asked. All of it
by the scripts a user has.
"""

import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from nanochat_hf.config import parse, read_recipe, user_errors
from nanochat_hf.training.tracking import read_metrics

RECIPES = Path(__file__).parents[1] / "recipes"
ARMS = {"masked": (), "reference": ("--train-on-all-tokens", "true", "--isolate", "false")}
COLUMNS = {"base": "base", "masked": "assistant's tokens, isolated", "reference": "all tokens, leaking packs"}
CONVERSATIONS = (
    ("Why is the sky blue?", "Say that in one short sentence."),
    ("Who are you?", "What can you do for me?"),
    ("How many r are in strawberry?", "Spell the word: elephant"),
)


@dataclass(frozen=True)
class ResultConfig:
    """From which model, on which data, how long."""

    model: str = field(metadata={"help": "folder of the base model (runs/base/final)"})
    output_dir: str = field(metadata={"help": "folder for the two runs, their answers and result.md"})
    data_root: str = field(
        default="../shared/data",
        metadata={"help": "folder that holds what recipes/sft_local.yaml and eval_local.yaml name"},
    )
    num_steps: int = field(default=100, metadata={"help": "optimizer steps of each fine-tuning"})
    max_seq_len: int = field(default=1024, metadata={"help": "positions of a row"})
    device_batch_size: int = field(default=32, metadata={"help": "rows taken at once"})
    total_batch_size: int | None = field(
        default=None, metadata={"help": "tokens of an optimizer step (default: four micro-batches)"}
    )
    eval_batches: int = field(default=8, metadata={"help": "micro-batches of validation data"})
    tasks: str = field(
        default="gsm8k,arc_easy,arc_challenge,mmlu,spelling_bee",
        metadata={"help": "tasks to evaluate, of eval_local.yaml"},
    )
    limit: int = field(default=200, metadata={"help": "questions of each task"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer in tokens"})
    jobs: int | None = field(
        default=None, metadata={"help": "programs at a time, dealt to the GPUs in turn (default: one a GPU)"}
    )
    init_lr_frac: float = field(default=1.0, metadata={"help": "factor on every learning rate of both fine-tunings"})


class Jobs:
    """Runs the scripts, each on a device of its own while it lasts; what they print goes to OUTPUT_DIR/NAME.log."""

    def __init__(self, folder, count):
        gpus = torch.cuda.device_count()
        self.folder, self.devices = folder, queue.Queue()
        for number in range(count or max(1, gpus)):
            self.devices.put(str(number % gpus) if gpus else None)
        self.workers = ThreadPoolExecutor(self.devices.qsize())
        machine = "single_gpu" if gpus else "cpu"
        self.launch = ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{machine}.yaml"]

    def run(self, name, *stages):
        """Run stages (title, command, standard input or None) in the background, in order; a future of their output."""
        return self.workers.submit(self._run, name, stages)

    def _run(self, name, stages):
        device, said = self.devices.get(), []
        try:
            for title, command, asked in stages:
                start = time.perf_counter()
                said.append(self._call(name, command, device, asked))
                print(f"[{name}] {title}: {time.perf_counter() - start:.0f} s", flush=True)
        finally:
            self.devices.put(device)
        return said

    def _call(self, name, command, device, asked):
        environment = (
            os.environ
            | {"TOKENIZERS_PARALLELISM": "false"}
            | ({"CUDA_VISIBLE_DEVICES": device} if device is not None else {})
        )
        log = self.folder / f"{name}.log"
        with log.open("a") as file:
            print(f"$ python {' '.join(command)}", file=file, flush=True)
            done = subprocess.run(
                [sys.executable, *command], env=environment, input=asked, text=True, stdout=subprocess.PIPE, stderr=file
            )
            file.write(done.stdout)
        if done.returncode:
            last = log.read_text().strip().splitlines()[-12:]
            raise ValueError(
                f"{name}: python {' '.join(command[:6])} … ended with {done.returncode}; {log} ends: {' | '.join(last)}"
            )
        return done.stdout


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the trainings, and write what they show."""
    config, _ = parse([ResultConfig], argv, description=__doc__)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    mixture, tasks = (localised(name, config, folder) for name in ("sft_local.yaml", "eval_local.yaml"))
    jobs, start = Jobs(folder, config.jobs), time.perf_counter()
    # the fine-tunings first: they take longest
    runs = {arm: jobs.run(arm, *fine_tuning(config, arm, mixture, tasks, jobs)) for arm in ARMS}
    runs["base"] = jobs.run("base", ("evaluation", evaluation(config, config.model, tasks, folder / "base.json"), None))
    said = {name: future.result() for name, future in runs.items()}
    figures = {name: accuracies(folder / f"{name}.json") for name in COLUMNS}
    for arm in ARMS:
        figures[arm] |= measured(folder / arm / "metrics.jsonl")
    figures["base"]["bpb on conversations, assistant's tokens"] = figures["masked"].pop("bpb before")
    figures["reference"].pop("bpb before")
    text = "\n".join([f"{config}", "", *table(figures), "", *transcripts({arm: said[arm][2:] for arm in ARMS})])
    (folder / "result.md").write_text(text + "\n")
    (folder / "result.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(
        f"{text}\n\n{time.perf_counter() - start:.0f} s in all; "
        f"written: {folder / 'result.md'}, {folder / 'result.json'}"
    )


def localised(name, config, folder):
    """Copy a recipe into `folder` with paths under --data-root; returns its path. ValueError if a file is missing."""
    recipe, root = read_recipe(RECIPES / name), config.data_root
    for key, entries in recipe.items():
        for entry in entries if key.endswith("_data") else ():
            if "path" in entry and (key != "eval_data" or entry["task"] in config.tasks.split(",")):
                entry["path"] = entry["path"].replace("../shared/data", root.rstrip("/"))
                if not Path(entry["path"]).is_file():
                    raise ValueError(f"--data-root {root}: {entry['path']} is not there; give the folder that holds it")
    path = folder / name
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return str(path)


def fine_tuning(config, arm, mixture, tasks, jobs):
    """The stages of one arm: train, evaluate, talk."""
    folder = jobs.folder
    shape = [config.device_batch_size, config.max_seq_len]
    model = str(folder / arm / "final")
    train = [
        *jobs.launch,
        "-m",
        "scripts.chat_sft",
        "--config",
        mixture,
        "--model",
        config.model,
        "--output-dir",
        str(folder / arm),
        "--num-steps",
        config.num_steps,
        "--device-batch-size",
        shape[0],
        "--max-seq-len",
        shape[1],
        "--total-batch-size",
        config.total_batch_size or 4 * shape[0] * shape[1],
        "--eval-every",
        max(1, config.num_steps // 2),
        "--eval-batches",
        config.eval_batches,
        "--log-every",
        max(1, config.num_steps // 20),
        "--init-lr-frac",
        config.init_lr_frac,
        *ARMS[arm],
    ]
    talk = [
        ("conversation", ["-m", "scripts.chat_cli", "--model", model], "".join(f"{line}\n" for line in asked))
        for asked in CONVERSATIONS
    ]
    return [
        ("fine-tuning", [str(part) for part in train], None),
        ("evaluation", evaluation(config, model, tasks, folder / f"{arm}.json"), None),
        *talk,
    ]


def evaluation(config, model, tasks, output):
    """The command that answers the tasks' questions with `model`."""
    return [
        "-m",
        "scripts.chat_eval",
        "--config",
        tasks,
        "--tasks",
        config.tasks,
        "--model",
        model,
        "--limit",
        str(config.limit),
        "--dtype",
        "bfloat16",
        "--max-new-tokens",
        str(config.max_new_tokens),
        "--output",
        str(output),
    ]


def accuracies(path):
    """{"mmlu, % of 200": 24.5, …, "ChatCORE of these": 0.05} from the file that chat_eval wrote."""
    found = json.loads(path.read_text())
    core = (
        {"ChatCORE of these tasks": round(found["chatcore_of_these_tasks"]["value"], 4)}
        if "chatcore_of_these_tasks" in found
        else {}
    )
    return {f"{task['name']}, % of {task['total']}": round(100 * task["accuracy"], 1) for task in found["tasks"]} | core


def measured(path):
    """What a run's metrics.jsonl says: bpb before and after, rate, seconds, targets."""
    entries = read_metrics(path)
    bpb = [entry["val/bpb"] for entry in entries if "val/bpb" in entry]
    rates = sorted(entry["train/tokens_per_second"] for entry in entries if "train/tokens_per_second" in entry)
    last = [entry for entry in entries if "train/tokens" in entry][-1]
    return {
        "bpb before": round(bpb[0], 4),
        "bpb on conversations, assistant's tokens": round(bpb[-1], 4),
        "steps": last["step"],
        "tokens": last["train/tokens"],
        "tokens/s, median": round(rates[len(rates) // 2]),
        "seconds of training, compilation included": round(last["train/seconds"]),
    }


def table(figures):
    """The figures side by side, as lines of markdown."""
    rows = list(dict.fromkeys(key for column in figures.values() for key in column))
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    shown = {row: [figures[name].get(row, "") for name in COLUMNS] for row in rows}
    return lines + [
        f"| {row} | " + " | ".join(f"{v:,}" if v != "" else "" for v in values) + " |" for row, values in shown.items()
    ]


def transcripts(said):
    """The conversations of each arm as lines of markdown; chat_cli marks each of its turns with "> "."""
    lines = []
    for arm, outputs in said.items():
        for asked, output in zip(CONVERSATIONS, outputs, strict=True):
            answers = output.split("\n> ", 1)[-1].split("\n> ") if "> " in output else [output]
            lines += [f"**{COLUMNS[arm]}**", ""]
            for question, answer in zip(asked, answers, strict=False):
                lines += [f"> {question}", "", " ".join(answer.split()) or "(nothing)", ""]
    return lines


if __name__ == "__main__":
    main()
