"""From nothing to a small chat model on two CPU cores: python -m nanochat_hf.cli.quickstart, or make quickstart.

Tokenizer, base model, fine-tuning, evaluation, three answers. Nothing is downloaded: the text is the docstrings of the
installed packages, the conversations are made by code. A second call skips what is finished and goes on where the first
one stopped.
"""

import argparse
import json
import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub.constants import HF_HOME

from nanochat_hf import NanochatConfig, scaling
from nanochat_hf.cli.stages import INTERRUPTED, Processes, Screen, Stage, seconds_left
from nanochat_hf.config import user_errors
from nanochat_hf.machine import cpu
from nanochat_hf.machine.compiling import lacks
from nanochat_hf.tasks.embedded import docstring_corpus, words
from nanochat_hf.tasks.generated import spell

RECIPES = Path(__file__).with_name("recipes")
VOCABULARY = 512
HELD_OUT = 200  # documents to validate the base model on
# Measured on two cores of an EPYC with AVX2 (docs/records): a compiled step, and what the stages take beside their
# steps.
REFERENCE_STEP = 0.4
SETTLED = 3  # steps after which the time of one is known; the first, which compiles, is left out
LONG = 30 * 60  # seconds from which a stage says why it takes so long
SLOW_PRODUCTS = 20  # GFLOP/s below which the processor itself is the reason
PROMPTS = ("Spell the word: elephant", "How many r are in strawberry?", "What is 123*45?")
# what the stages import; the fork server does it once
COMMANDS = ("base_train", "chat_sft", "chat_eval", "chat_cli", "tok_train")
PRELOAD = (*(f"nanochat_hf.cli.{name}" for name in COMMANDS), "matplotlib.backends.backend_agg")


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run all stages; SystemExit with 130 where it was interrupted, and with 2 and one line where a stage failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", default="runs/quickstart", help="folder for everything (default: %(default)s)")
    root = Path(parser.parse_args(argv).output_dir)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        prepare(root)
        run_all(plan(root), root)
    finally:
        signal.signal(signal.SIGTERM, before)


def run_all(stages: Sequence[Stage], root: Path) -> None:
    """The text, the stages and three answers; SystemExit as `main`."""
    if not all(stage.done for stage in stages):
        print(*outlook([stage for stage in stages if not stage.done], speed()), sep="\n", flush=True)
    processes = Processes(PRELOAD)
    processes.warm_up()
    write_text(root)
    for number, stage in enumerate(stages, 2):
        run(stage, stages, processes, f"[{number}/{len(stages) + 1} {stage.name}]", root)
    final = root / "sft" / "final"
    for prompt in PROMPTS:
        print(f"\n> {prompt}", flush=True)
        if code := processes.run("nanochat_hf.cli.chat_cli", ["--model", str(final), "-p", prompt], Screen()):
            sys.exit(code)
    print(*goodbye(final), sep="\n")


def prepare(root: Path) -> None:
    """Make the folder, and set what all stages find in their environment.

    ValueError where the folder cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / ".writable").touch()
        (root / ".writable").unlink()
    except OSError as error:
        raise ValueError(
            f"{root.absolute()}: cannot be written ({error.strerror}); go to a folder of your own, or give --output-dir"
        ) from None
    # one process on the CPU, without Accelerate's launcher, whose own start takes seconds
    own = {
        "ACCELERATE_USE_CPU": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    os.environ.update(own)
    if not writable(Path(HF_HOME)):  # a user without a home folder
        cache = (root / "cache").absolute()
        caches = {"HF_HOME": "", "TORCHINDUCTOR_CACHE_DIR": "inductor", "MPLCONFIGDIR": "matplotlib"}
        os.environ.update({name: str(cache / folder) for name, folder in caches.items()})


def writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, or in the one where it would be made.

    A path that is not absolute is one whose ~ stands for no home.
    """
    if not folder.is_absolute():
        return False
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)


def recipe(name: str) -> dict:
    """The settings of one of the recipes.

    >>> recipe("base")["depth"]
    4
    """
    return yaml.safe_load((RECIPES / f"quickstart_{name}.yaml").read_text(encoding="utf-8"))


def model_config() -> NanochatConfig:
    """The model that the base recipe makes."""
    base = recipe("base")
    shape = {"aspect_ratio": base["aspect_ratio"], "head_dim": base["head_dim"]}
    return scaling.model_config(base["depth"], VOCABULARY, base["max_seq_len"], **shape)


def speed() -> cpu.Speed:
    """How fast this CPU is at products of that model's shape, with as many threads as help now."""
    cpu.set_threads()
    return cpu.measure("cpu", model_config().hidden_size)


def plan(root: Path) -> list[Stage]:
    """The stages after the text, in order."""
    tokenizer, base, sft, answers = root / "tokenizer", root / "base", root / "sft", root / "answers.json"
    text, draft = root / "text.jsonl", root / "tokenizer.partial"
    # fine-tuning finds in torch's cache what the base stage has compiled, so it pays in both
    compiled = not lacks() and os.environ.get("TORCH_COMPILE_DISABLE", "0") in ("", "0")

    def training(name, module, *flags):
        folder = root / name
        flags = (*flags, "--output-dir", str(folder), "--compile", str(compiled).lower())
        argv = ("--config", str(RECIPES / f"quickstart_{name}.yaml"), *flags)
        return Stage(
            name,
            module,
            argv,
            makes=folder / "final",
            steps=recipe(name)["num_steps"],
            metrics=folder / "metrics.jsonl",
            seconds=30,
        )

    read = ("--data", str(text), "--vocab-size", str(VOCABULARY), "--max-chars", "4000000", "--output", str(draft))
    known = ("--data", str(text), "--validation", str(root / "validation.jsonl"), "--tokenizer", str(tokenizer))
    asked = ("--config", str(RECIPES / "quickstart_eval.yaml"), "--model", str(sft / "final"), "--output", str(answers))
    return [
        Stage("tokenizer", "nanochat_hf.cli.tok_train", read, makes=tokenizer, draft=draft, seconds=10),
        training("base", "nanochat_hf.cli.base_train", *known),
        training("sft", "nanochat_hf.cli.chat_sft", "--model", str(base / "final")),
        Stage("evaluation", "nanochat_hf.cli.chat_eval", asked, makes=answers, seconds=30),
    ]


def outlook(stages: Sequence[Stage], speed: cpu.Speed) -> list[str]:
    """What is said before the first stage: how long all will take on a CPU of this speed.

    A second line warns where the CPU is too slow.
    """
    base, model = recipe("base"), scaling.skeleton(model_config())
    positions, tokens = base["max_seq_len"], base["device_batch_size"] * base["max_seq_len"]
    each = cpu.training_seconds(scaling.flops_per_token(model, positions) * tokens, speed)
    seconds = sum(stage.steps * each + stage.seconds * each / REFERENCE_STEP for stage in stages)
    told = f"{', '.join(stage.name for stage in stages)}: {shown(seconds)} on this CPU ({speed.gflops:.3g} GFLOP/s)"
    slow = cpu.too_slow(speed)
    remedy = "end the other programs" if busy() else "a machine with a faster processor does this in minutes"
    return [told, f"warning: {slow}; {remedy}"] if slow else [told]


def busy() -> float:
    """How many programs more than there are cores want to run, of late; 0 where all have a core."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    more = load - cpu.available_cores()
    return more if more > 0.5 else 0.0


def shown(seconds: float) -> str:
    """Seconds in words.

    >>> shown(300)
    'about 5.0 min'
    """
    return f"about {scaling.shown_hours(seconds / 3600)}"


def write_text(root: Path) -> None:
    """Write text.jsonl, and the last documents to validation.jsonl.

    Text is the embedded documents and spellings of the training words, since the tokenizer has to meet those too.
    """
    text, validation = root / "text.jsonl", root / "validation.jsonl"
    if text.is_file() and validation.is_file():
        return
    start = time.perf_counter()
    print("\n[1/5 text] docstrings of the standard library, torch and transformers", flush=True)
    documents, known = docstring_corpus(), words("train")
    spellings = [" ".join(spell(word) for word in known[i : i + 40]) for i in range(0, len(known), 40)]
    for target, texts in ((validation, documents[-HELD_OUT:]), (text, documents[:-HELD_OUT] + spellings)):
        partial = target.with_suffix(".partial")
        try:
            partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
            partial.replace(target)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
    took, characters = time.perf_counter() - start, sum(map(len, documents)) / 1e6
    print(f"[text] {took:.0f} s: {len(documents):,} texts, {characters:.1f} M characters, {len(known):,} words")


def run(stage: Stage, stages: Sequence[Stage], processes: Processes, label: str, root: Path) -> None:
    """Run one stage, unless it is finished; ends the program where it failed or was interrupted."""
    if stage.done:
        print(f"{label} finished before, skipped ({stage.makes})", flush=True)
        return
    screen, start = Screen(root / f"{stage.name}.log"), time.perf_counter()
    print(f"\n{label} python -m {stage.module} {shlex.join(stage.argv)}", flush=True)
    forecast = Forecast(stage, stages, screen)
    code = processes.run(stage.module, stage.argv, screen, forecast)
    if code in INTERRUPTED and not stage.done:
        print(f"[{stage.name}] stopped; call again to go on: finished stages and checkpoints are kept in {root}")
        sys.exit(130)
    if code not in (0, *INTERRUPTED):
        reason = f"was killed by signal {-code}, most likely for want of memory" if code < 0 else "failed"
        print(
            f"[{stage.name}] {reason} (all of its output: {screen.log}); correct the cause and call again: finished "
            "stages are kept",
            file=sys.stderr,
        )
        sys.exit(2)
    if stage.draft:
        stage.draft.replace(stage.makes)
    print(f"[{stage.name}] {time.perf_counter() - start:.0f} s", flush=True)


class Forecast:
    """Says once, as soon as a stage's steps have a speed, how long all stages will take.

    Where this stage takes more than LONG seconds, it also says why.
    """

    def __init__(self, stage: Stage, stages: Sequence[Stage], screen: Screen):
        self.stage, self.stages, self.screen, self.said = stage, stages, screen, not stage.steps
        self.before = len(stage.step_times()[1])  # recorded by an earlier call

    def __call__(self) -> None:
        """Look whether it is time; called twice a second."""
        if self.said or len(times := self.stage.step_times()[1][self.before :]) < SETTLED:
            return
        self.said = True
        left = seconds_left(self.stages, self.stage, statistics.median(times[1:]), REFERENCE_STEP)
        each = ", ".join(f"{name} {scaling.shown_hours(seconds / 3600)}" for name, seconds in left.items())
        self.screen.say(f"{shown(sum(left.values()))} to go: {each}")
        if left[self.stage.name] > LONG:
            self.screen.say(why_so_long(self.stage.name, left[self.stage.name], speed()))


def why_so_long(name: str, seconds: float, speed: cpu.Speed) -> str:
    """One line: why a stage takes so long on this machine, and what would make it shorter."""
    cores, causes = cpu.available_cores(), []
    if more := busy():
        causes.append((f"{more:.1f} programs too many share {cores} cores", "end the others"))
    if lacks():
        causes.append((f"training is not compiled for want of {lacks()}", "install it: about twice as fast"))
    if speed.gflops < SLOW_PRODUCTS or not causes:
        causes.append(
            (f"products reach {speed.gflops:.2g} GFLOP/s on {cores} cores", "take a faster processor or a GPU")
        )
    reasons, remedies = (", ".join(texts) for texts in zip(*causes, strict=True))
    return f"{name} takes {shown(seconds)} because {reasons}; to make it shorter: {remedies}"


def goodbye(final: Path) -> list[str]:
    """Where the model lies and what to do with it, as commands to copy."""
    here = Path.cwd()
    python = Path(sys.executable)
    python = python.relative_to(here) if python.is_relative_to(here) else python
    python, model = shlex.quote(str(python)), shlex.quote(str(final))
    train = "--data YOUR_CHATS.jsonl --output-dir runs/my --max-seq-len 320"
    return [
        f"\nThe model lies in {final}. Next:",
        f"  {python} -m nanochat_hf.cli.chat_cli --model {model}",
        f"  {python} -m nanochat_hf.cli.chat_eval --model {model} --tasks spelling_bee --limit 500",
        f"  {python} -m nanochat_hf.cli.chat_sft --model {model} {train}",
    ]


if __name__ == "__main__":
    main()
