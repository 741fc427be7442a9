"""The quickstart: its plan, what it says of the time, what it does where something is in the way."""

import configparser
import json
import shutil
from pathlib import Path

import pytest

from nanochat_hf.cli import chat_eval, quickstart, tok_train
from nanochat_hf.cli.stages import Screen, Stage
from nanochat_hf.config import parse
from nanochat_hf.hub.push import HubConfig
from nanochat_hf.machine.cpu import Speed
from nanochat_hf.training.callbacks.core import CoreConfig
from nanochat_hf.training.config import PARTS, TrainConfig
from nanochat_hf.training.finetuning import SFTConfig
from nanochat_hf.training.pretraining import BASE_PARTS, BaseConfig
from tests.support.hub import ROOT

FAST, SLOW = Speed(60.0, 7.2), Speed(0.5, 0.1)


@pytest.fixture
def environment(monkeypatch):
    """What prepare() sets is forgotten after the test."""
    for name in ("ACCELERATE_USE_CPU", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def one_line(capsys):
    """The one line on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_every_stage_has_flags_that_its_command_takes(tmp_path):
    stages = {stage.name: stage for stage in quickstart.plan(tmp_path / "a b")}
    parse([tok_train.TokenizerConfig], stages["tokenizer"].argv)
    base, *parts, _, _, _ = parse([BaseConfig, *BASE_PARTS, CoreConfig, HubConfig], stages["base"].argv)
    config = TrainConfig(*parts)
    lists = ("train_data", "validation_data")
    sft, *parts, _, data = parse([SFTConfig, *PARTS, HubConfig], stages["sft"].argv, lists=lists)
    tuned = TrainConfig(*parts)
    asked, _ = parse([chat_eval.EvalConfig], stages["evaluation"].argv, lists=("eval_data",))
    assert list(stages) == ["tokenizer", "base", "sft", "evaluation"]
    # each reads what the one before leaves, and can be gone on with
    assert base.tokenizer == str(stages["tokenizer"].makes) and sft.model == str(stages["base"].makes)
    assert asked.model == str(stages["sft"].makes) and asked.output == str(stages["evaluation"].makes)
    assert config.run.resume == tuned.run.resume == "auto"
    assert config.track.log_every == tuned.track.log_every == 1
    assert (stages["base"].steps, stages["sft"].steps) == (config.run.num_steps, tuned.run.num_steps)
    # one graph is compiled for both
    shapes = [(run.device_batch_size, run.max_seq_len) for run in (config.run, tuned.run)]
    assert shapes[0] == shapes[1]
    assert {entry["task"] for entry in data["train_data"]} == set(asked.tasks.split(","))


def test_recipes_are_part_of_the_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "recipes/*.yaml" in setup["options.package_data"]["nanochat_hf.cli"]
    assert {path.name for path in quickstart.RECIPES.iterdir()} >= {
        f"quickstart_{name}.yaml" for name in ("base", "sft", "eval")
    }


def test_a_slow_processor_is_told_before_the_first_stage(tmp_path):
    stages = quickstart.plan(tmp_path)
    (fast,), (slow, warning) = (quickstart.outlook(stages, speed) for speed in (FAST, SLOW))
    assert "tokenizer, base, sft, evaluation: about" in fast and " min on this CPU (60 GFLOP/s)" in fast
    assert " h on this CPU (0.5 GFLOP/s)" in slow and "this CPU reaches 0.5 GFLOP/s" in warning
    assert float(slow.split("about ")[1].split()[0]) * 60 == pytest.approx(
        120 * float(fast.split("about ")[1].split()[0]), rel=0.02
    )


@pytest.mark.parametrize(
    ("load", "lacking", "speed", "said"),
    [
        (4.0, "", FAST, ["2.0 programs too many share 2 cores", "end the others"]),
        (2.0, "a C++ compiler (g++)", FAST, ["not compiled for want of a C++ compiler (g++)", "install it"]),
        (2.0, "", SLOW, ["products reach 0.5 GFLOP/s on 2 cores", "a faster processor"]),
        (2.0, "", FAST, ["products reach 60 GFLOP/s on 2 cores", "a faster processor"]),
        (4.0, "g++", SLOW, ["programs too many", "not compiled", "products reach"]),
    ],
)
def test_a_long_stage_says_why_and_what_would_help(monkeypatch, load, lacking, speed, said):
    monkeypatch.setattr(quickstart.cpu, "available_cores", lambda: 2)
    monkeypatch.setattr(quickstart.os, "getloadavg", lambda: (load, 0, 0), raising=False)
    monkeypatch.setattr(quickstart, "lacks", lambda: lacking)
    line = quickstart.why_so_long("sft", 3000, speed)
    assert line.startswith("sft takes about 50.0 min because ") and all(part in line for part in said)
    assert line.count(",") == 2 * (len([c for c in (load > 2, lacking, speed is SLOW) if c]) - 1 if said[2:] else 0)


def test_the_forecast_comes_after_three_steps_and_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(quickstart, "speed", lambda: SLOW)
    stages = [
        Stage("base", "none", (), makes=tmp_path / "base", steps=100, metrics=tmp_path / "metrics.jsonl"),
        Stage("sft", "none", (), makes=tmp_path / "sft", steps=600, seconds=0),
    ]
    old = [{"step": 1, "train/step_seconds": 900.0}] * 5  # of an earlier call
    seconds = [50.0, 6.0, 6.2]  # the first compiles
    stages[0].metrics.write_text("".join(json.dumps(entry) + "\n" for entry in old))
    forecast = quickstart.Forecast(stages[0], stages, Screen(terminal=False))
    with stages[0].metrics.open("a") as file:
        for step, each in enumerate(seconds, 8):
            forecast()
            assert not capsys.readouterr().out
            file.write(json.dumps({"step": step, "train/step_seconds": each}) + "\n")
            file.flush()
    forecast()
    # (100 − 10) and 600 steps of 6.1 s
    assert capsys.readouterr().out == "about 1.17 h to go: base 9.2 min, sft 1.02 h\n"
    forecast()
    assert not capsys.readouterr().out
    stages[1] = Stage("sft", "none", (), makes=tmp_path / "sft", steps=600, metrics=tmp_path / "sft.jsonl")
    late = quickstart.Forecast(stages[1], stages, Screen(terminal=False))
    stages[1].metrics.write_text("".join(json.dumps({"step": n, "train/step_seconds": 6.1}) + "\n" for n in (1, 2, 3)))
    late()
    assert "sft takes about 1.01 h because" in capsys.readouterr().out.splitlines()[1]


def test_a_user_without_a_home_gets_caches_in_the_folder(environment, tmp_path):
    environment.setattr(quickstart, "HF_HOME", "~/.cache/huggingface")  # as it is left where nobody has that home
    quickstart.prepare(tmp_path / "run")
    assert quickstart.os.environ["HF_HOME"] == str(tmp_path / "run" / "cache")
    assert quickstart.os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "run" / "cache" / "inductor")
    environment.delenv("HF_HOME")
    environment.setattr(quickstart, "HF_HOME", str(tmp_path / "home" / "deep"))
    quickstart.prepare(tmp_path / "run")
    assert "HF_HOME" not in quickstart.os.environ and not (tmp_path / "home").exists()


def test_a_folder_that_cannot_be_written_is_one_line(environment, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        quickstart.main(["--output-dir", str(tmp_path / "file" / "run")])
    assert "cannot be written" in (line := one_line(capsys)) and "--output-dir" in line


class Fake:
    """Processes whose commands end with `code` and leave `leaves`."""

    def __init__(self, code, leaves=None):
        self.code, self.leaves, self.ran = code, leaves, []

    def run(self, module, argv, screen, tick=None):
        self.ran.append(module)
        if self.leaves:
            self.leaves.mkdir()
        return self.code


def test_a_stage_is_run_once_and_its_draft_becomes_the_result(tmp_path, capsys):
    stage = Stage("tokens", "some.module", ("a b",), makes=tmp_path / "made", draft=tmp_path / "draft")
    processes = Fake(0, stage.draft)
    for _ in range(2):
        quickstart.run(stage, [stage], processes, "[2/5 tokens]", tmp_path)
    assert processes.ran == ["some.module"] and stage.done and not stage.draft.exists()
    said = capsys.readouterr().out
    assert "[2/5 tokens] python -m some.module 'a b'" in said and "[2/5 tokens] finished before, skipped" in said


@pytest.mark.parametrize(
    ("code", "ends", "said"),
    [
        (2, 2, "[sft] failed (all of its output: "),
        (-9, 2, "[sft] was killed by signal 9, most likely for want of memory"),
        (130, 130, "call again to go on"),
        (143, 130, "call again to go on"),
    ],
)
def test_a_stage_that_does_not_finish_ends_the_quickstart(tmp_path, capsys, code, ends, said):
    stage = Stage("sft", "some.module", (), makes=tmp_path / "made", draft=tmp_path / "draft")
    with pytest.raises(SystemExit) as ended:
        quickstart.run(stage, [stage], Fake(code, stage.draft), "[4/5 sft]", tmp_path)
    printed = capsys.readouterr()
    assert ended.value.code == ends and said in printed.out + printed.err and not stage.done
    assert "kept" in printed.out + printed.err


def test_a_full_disk_leaves_no_half_text(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "docstring_corpus", lambda: ["text"] * 300)
    monkeypatch.setattr(quickstart, "words", lambda split: ["word"])

    def full(path, text, **_):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        quickstart.write_text(tmp_path)
    assert not list(tmp_path.iterdir())


def test_from_nothing_to_answers_and_a_second_call_skips(environment, tmp_path, capsys):
    """All stages, as small as they can be, in a folder with a space in its name."""
    recipes = shutil.copytree(quickstart.RECIPES, tmp_path / "recipes")
    smaller = {"num_steps": 4, "device_batch_size": 2, "warmup_steps": 1, "limit": 3, "max_new_tokens": 4}
    for path in recipes.iterdir():
        lines = [line.replace("000}", "0}") for line in path.read_text().splitlines()]
        names = [line.partition(":")[0] for line in lines]
        changed = [f"{n}: {smaller[n]}" if n in smaller else line for n, line in zip(names, lines, strict=True)]
        path.write_text("\n".join(changed))
    environment.setattr(quickstart, "RECIPES", recipes)
    environment.setenv("TORCH_COMPILE_DISABLE", "1")
    root = tmp_path / "a b"
    quickstart.main(["--output-dir", str(root)])
    said = capsys.readouterr().out
    answers = json.loads((root / "answers.json").read_text())
    assert [task["total"] for task in answers["tasks"]] == [3] * 4
    assert "[5/5 evaluation]" in said and "to go: base" in said and "> What is 123*45?" in said
    assert f"--model '{root}/sft/final'" in said
    for name in ("tokenizer", "base", "sft", "evaluation"):
        block = said.split(f" {name}] python -m")[1].split(f"[{name}] ")[0]
        assert len(block.splitlines()) < 40, "more than a screen"
    quickstart.main(["--output-dir", str(root)])
    assert capsys.readouterr().out.count("finished before, skipped") == 4
