"""What the pages name is there: files, links, commands and their flags."""

import contextlib
import doctest
import importlib
import io
import re
import shlex
import sys
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from nanochat_hf.rl.rewards import Grader, Job, NamedReward
from nanochat_hf.tasks.base import pair

from .pages import PAGES, ROOT, blocks, commands, exists, links, own_command, paths, single_flags, text_of

ARCHITECTURE = ROOT / "docs/architecture.md"
COMMANDS = [
    p for p in sorted((ROOT / "scripts").glob("*.py")) if p.stem not in ("__init__", "bench", "serve_transformers")
]
WRITTEN = {"final/", "best/"}  # folders of a run
ANYWHERE = "any machine"  # the title of blocks that are run here

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@by_page
def test_paths_that_are_named_exist(page):
    assert [path for path in paths(page) if not exists(path)] == []


@by_page
def test_links_lead_to_files(page):
    assert [link for link in links(page) if not (page.parent / link).exists()] == []


def test_architecture_names_every_folder_and_stop():
    said = text_of(ARCHITECTURE)
    folders = [path for path in (ROOT / "nanochat_hf").iterdir() if (path / "__init__.py").is_file()]
    assert [folder.name for folder in folders if f"| `{folder.name}/` |" not in said] == []
    for place in set(re.findall(r"`([a-z_]+(?:/[a-z_0-9]+)*/)`", said)) - WRITTEN:
        assert exists(place), place


def test_the_five_questions_are_answered_by_the_files_that_say_so():
    said = dict(re.findall(r"^\| (Where .*?) \| `([^`]+)`.*\|$", text_of(ARCHITECTURE), re.MULTILINE))
    answers = {
        "Where does a row become ids?": "def render",
        "Where are rows planned?": "def plan_rows",
        "Where does a step happen?": "    def step",
        "Where is a kernel chosen?": "def choose",
        "Where is a checkpoint written?": "def save",
    }
    assert said.keys() == answers.keys()
    for question, definition in answers.items():
        assert f"{definition}(" in (ROOT / "nanochat_hf" / said[question]).read_text(), question


def test_examples_of_the_architecture_run():
    failed, tried = doctest.testfile(str(ARCHITECTURE), module_relative=False)
    assert tried >= 9 and failed == 0


def run(name, arguments):
    """Run a command of the package, or a module of scripts: what it prints, and its exit code."""
    package = "nanochat_hf.cli" if (ROOT / f"nanochat_hf/cli/{name}.py").is_file() else "scripts"
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        try:
            importlib.import_module(f"{package}.{name}").main()
        except SystemExit as end:
            return said.getvalue(), end.code or 0
    return said.getvalue(), 0


@cache
def help_of(name):
    said, code = run(name, ["--help"])
    assert code == 0, name
    return said


def flags_of(name):
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", help_of(name)))


@by_page
def test_commands_and_flags_exist(page):
    wrong = []
    for words in commands(page):
        wrong += [f"{word} is no file" for word in words if _missing_config(word)]
        if words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            wrong += [f"make {word}" for word in words[1:] if word not in targets]
        found = own_command(words)
        if found is None:
            continue
        name, arguments = found
        if name == "bench":  # the name of a benchmark, then its flags
            name, arguments = f"benchmarks.{arguments[0]}", arguments[1:]
        given = {word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word) and "*" not in word}
        wrong += [f"{name} {flag}" for flag in sorted(given - flags_of(name)) if not flag.endswith("-")]
    assert wrong == []


# of accelerate launch, pytest and gradio's like
FOREIGN = {"--config_file", "--machine_rank", "--main_process_ip", "--include_path", "--trust-remote-code"}


@by_page
def test_flags_that_are_named_alone_are_some_commands(page):
    known = set().union(*(flags_of(path.stem) for path in COMMANDS)) | FOREIGN
    assert sorted(set(single_flags(page)) - known) == []


def _missing_config(word):
    if "X" in word or not word.startswith(("accelerate_configs/", "scripts/recipes/")):
        return False
    return not (ROOT / word).is_file()


@by_page
def test_shell_blocks_say_what_they_need(page):
    """`title="any machine"`: it runs below. Any other title says what the reader must have for it."""
    if page == ROOT / "README.md":  # GitHub shows no titles; the text says it
        return
    assert [block.text for block in blocks(page) if block.language == "bash" and not block.title] == []


def _runnable():
    for page in PAGES:
        for block in blocks(page):
            if block.language == "bash" and block.title == ANYWHERE:
                for line in re.sub(r"\\\n", " ", block.text).splitlines():
                    if line.strip():
                        yield pytest.param(line, id=f"{page.name}: {line.strip()[:60]}")


@pytest.mark.parametrize("line", list(_runnable()))
def test_what_needs_nothing_runs(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    said, code = run(*own_command(shlex.split(line, comments=True)))
    assert said and code == 0


def python_block(page, containing):
    """What a page's Python block that contains a text defines."""
    (text,) = [b.text for b in blocks(ROOT / page) if b.language == "python" and containing in b.text]
    defined = {}
    exec(text, defined)
    return defined


def test_task_of_the_page_is_one():
    task = python_block("docs/howto/task.md", "BACKWARDS = ")["BACKWARDS"]
    conversation = task.to_conversation(task.load("train", limit=1)[0])
    assert conversation == pair("Write stone backwards.", "enots")
    assert task.grade(conversation, "enots\n") and not task.grade(conversation, "stone")


def test_reward_of_the_page_is_one():
    brief = python_block("docs/howto/reward.md", "def brief")["brief"]
    graded = Grader([NamedReward("brief", brief, 0.5)])([Job({}, text, None) for text in ("", "word " * 25)])
    assert [answer.total for answer in graded] == [0.5, 0.25]


def test_callback_of_the_page_is_one():
    said = []
    accelerator = SimpleNamespace(is_main_process=True, print=lambda *words: said.append(words))
    trainer = SimpleNamespace(accelerator=accelerator, raw_model=torch.nn.Linear(1, 1, bias=False))
    callback = python_block("docs/howto/callback.md", "def say_scalars")["say_scalars"]
    for step in (99, 100):
        callback(trainer, SimpleNamespace(step=step))
    assert said == [(100, "weight", trainer.raw_model.weight.item())]
