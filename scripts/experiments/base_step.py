"""The quickstart's base step, of this tree and of an earlier commit side by side: seconds a step on this CPU.

    python -m scripts.experiments.base_step --before 7d38833 --record docs/records/base-step

Both builds run the first steps of their own quickstart's base stage, each from a copy of its own commit, on the same
text and tokenizer, one after the other and several times over. The first step of a run compiles and is left out.
`ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2` makes a processor with AVX-512 do without it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from nanochat_hf.cli import quickstart
from nanochat_hf.config import user_errors
from nanochat_hf.machine import cpu
from nanochat_hf.tools.record import Table, write_record
from nanochat_hf.training.tracking import read_metrics

# what the earlier quickstart gave its base stage, beside paths and the number of steps
BEFORE = (
    "--depth 4 --aspect-ratio 48 --head-dim 64 --eval-every 0 --scale-lr-to-batch false --weight-decay 0 "
    "--device-batch-size 8 --max-seq-len 320 --embedding-lr 0.2 --warmup-steps 10 --warmdown-ratio 0.6"
).split()
LAUNCH = ("-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml", "-m")


def unpack(commit: str, folder: Path) -> Path:
    """The files of `commit` in a folder of their own; CalledProcessError where git does not know it."""
    archive = folder / "tree.tar"
    subprocess.run(["git", "archive", "--output", str(archive), commit], check=True)
    tree = folder / "before"
    with tarfile.open(archive) as files:
        files.extractall(tree, filter="data")
    return tree


def prepare(root: Path) -> tuple[Path, Path, Path]:
    """Text, validation text and tokenizer of the quickstart, made in `root`."""
    quickstart.write_text(root)
    tokenizer = next(stage for stage in quickstart.plan(root) if stage.name == "tokenizer")
    subprocess.run([sys.executable, "-m", tokenizer.module, *tokenizer.argv], check=True)
    return root / "text.jsonl", root / "validation.jsonl", tokenizer.draft or tokenizer.makes


def step_seconds(command: list[str], tree: Path, output: Path, compiled: bool) -> list[float]:
    """Seconds of each step but the first, of `command` run in `tree`."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tree)}
    if not compiled:
        environment["TORCH_COMPILE_DISABLE"] = "1"
    done = subprocess.run([sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command[:6])} … failed in {tree}: {done.stderr.strip()[-2000:]}")
    entries = [entry for entry in read_metrics(output / "metrics.jsonl") if "train/step_seconds" in entry]
    return [entry["train/step_seconds"] for entry in entries][1:]


@user_errors
def main() -> None:
    """Time both builds, print the table, and write the record if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="the earlier commit")
    parser.add_argument("--steps", type=int, default=5, help="steps of the earlier build (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default: %(default)s)")
    parser.add_argument("--record", help="folder of the record to write")
    args = parser.parse_args()
    here = Path.cwd()
    times: dict[str, list[float]] = {"before": [], "now, uncompiled": [], "now, compiled": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        before = unpack(args.before, root)
        text, validation, tokenizer = prepare(root)
        files = ["--data", str(text), "--validation", str(validation), "--tokenizer", str(tokenizer)]
        recipe = str(quickstart.RECIPES / "quickstart_base.yaml")
        for repeat in range(args.repeats):
            for build, measured in times.items():
                output, compiled = root / f"{build}{repeat}".replace(", ", "_"), build == "now, compiled"
                steps = args.steps if build == "before" else 4 * args.steps
                ends = ["--num-steps", str(steps), "--save-every", "0", "--log-every", "1", "--output-dir", str(output)]
                if build == "before":
                    command, tree = [*LAUNCH, "scripts.base_train", *files, *BEFORE, *ends], before
                else:
                    own = ["--config", recipe, "--compile", str(compiled).lower()]
                    command, tree = [*LAUNCH, "nanochat_hf.cli.base_train", *own, *files, *ends], here
                found = step_seconds(command, tree, output, compiled)
                measured.append(statistics.median(found))
                print(f"{build}: {measured[-1]:.3g} s a step ({len(found)} steps)", flush=True)
    base = statistics.median(times["before"])
    rows = [[build, statistics.median(t), min(t), max(t), base / statistics.median(t)] for build, t in times.items()]
    units = {"build": None, "median": "s", "fastest": "s", "slowest": "s", "times as fast": None}
    table = Table(f"The base stage's step of 2,560 tokens, {args.repeats} runs of each in turn", units, rows)
    print(json.dumps(table.dicts(), indent=1))
    if args.record:
        isa = os.environ.get("ATEN_CPU_CAPABILITY", "all that the processor has")
        note = f"instructions: {isa}; {cpu.available_cores()} cores, load {os.getloadavg()[0]:.1f} at the end"
        print(write_record(args.record, {"steps": table}, note=note))


if __name__ == "__main__":
    main()
