"""Stages: what of their output is shown, how they are run and stopped, how long the rest will take."""

import contextlib
import io
import json
import os
import time
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from nanochat_hf.cli.stages import Processes, Screen, Stage, seconds_left
from nanochat_hf.training.tracking import Progress
from tests.support.processes import Run


@pytest.fixture(scope="module")
def processes():
    return Processes([])


def child(folder, monkeypatch, code):
    """The name of a module in `folder` whose main(argv) is this code."""
    name = f"child_{len(list(folder.glob('*.py')))}_of_{os.getpid()}_{time.monotonic_ns()}"
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    (folder / f"{name}.py").write_text(f"import os, signal, sys, time\n\n\ndef main(argv):\n{lines}")
    monkeypatch.syspath_prepend(folder)
    return name


def test_lines_are_shown_and_bars_are_not_lines(capsys, tmp_path):
    screen = Screen(tmp_path / "log", terminal=False)
    parts = (
        "plan of it:\n  parameters  2\u00b7M\n",
        "rea",
        "ding:   0%|",
        " | 0/9\rreading:  50%|#| 5/9\rreading: 55%|#| 5/9\r",
        "done\nend",
    )
    for part in parts:
        screen.feed(part.encode())
    screen.close()
    assert capsys.readouterr().out.splitlines() == [
        "plan of it:",
        "  parameters  2\u00b7M",
        "reading:  50%|#| 5/9",
        "done",
        "end",
    ]
    assert (tmp_path / "log").read_text(encoding="utf-8") == "".join(parts).replace("\r", "\n")


def test_on_a_terminal_a_bar_stays_in_its_line(capsys):
    screen = Screen(terminal=True)
    screen.feed(b"plan\nx step 1/100 (1%)  loss 3\nx step 2/100 (2%)  loss 2\nwarning\n")
    screen.close()
    assert capsys.readouterr().out == (
        "plan\n\r\033[Kx step 1/100 (1%)  loss 3\r\033[Kx step 2/100 (2%)  loss 2\r\033[Kwarning\n"
    )


def test_what_training_and_tqdm_print_counts_as_a_bar(capsys):
    progress = Progress(SimpleNamespace(is_main_process=True), 20, 0, "base d4")
    for step in range(1, 21):
        progress.update(step, {"loss": "3.1", "lr": "1.00"}, fresh=True)
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 20
    bars = io.StringIO()
    with contextlib.redirect_stderr(bars):
        for _ in tqdm(range(20), mininterval=0, desc="spelling", unit="batch", file=bars):
            pass
    for text in (printed, bars.getvalue()):
        screen = Screen(terminal=False)
        screen.feed(text.encode() + b"\n")
        assert len(capsys.readouterr().out.splitlines()) == 10


def test_a_log_that_cannot_be_written_ends_nothing(capsys, tmp_path):
    Screen(tmp_path / "none" / "log", terminal=False).feed(b"shown\n")
    assert capsys.readouterr().out == "shown\n"


def test_a_process_gives_its_output_and_its_exit_code(processes, monkeypatch, tmp_path, capsys):
    code = "print('out', argv)\nos.system('echo inner')\nprint('err', file=sys.stderr)\nsys.exit(int(argv[0]))"
    name = child(tmp_path, monkeypatch, code)
    assert processes.run(name, ["3", "a b"], Screen(terminal=False)) == 3
    assert capsys.readouterr().out.splitlines() == ["out ['3', 'a b']", "inner", "err"]
    assert processes.run(name, ["0"], Screen(terminal=False)) == 0


def test_ctrl_c_is_passed_on_once_and_the_process_may_finish(processes, monkeypatch, tmp_path, capsys):
    code = """asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
print("ready")
while not asked: time.sleep(0.01)
time.sleep(0.7)
print("saved", len(asked))
sys.exit(143)"""
    screen = Screen(tmp_path / "log", terminal=False)

    def press(pressed=[]):  # noqa: B006  remembers that it was pressed
        if not pressed and screen.log.is_file() and "ready" in screen.log.read_text():
            pressed.append(True)
            raise KeyboardInterrupt

    assert processes.run(child(tmp_path, monkeypatch, code), [], screen, press) == 130
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "ready" and "stopping after this step" in said[1] and said[2:] == ["saved 1"]


def test_a_second_ctrl_c_ends_a_process_that_does_not(processes, monkeypatch, tmp_path, capsys):
    code = "signal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('ready')\ntime.sleep(100)"
    screen = Screen(tmp_path / "log", terminal=False)

    def press():
        if screen.log.is_file():
            raise KeyboardInterrupt

    start = time.monotonic()
    assert processes.run(child(tmp_path, monkeypatch, code), [], screen, press) == 130
    assert time.monotonic() - start < 60 and capsys.readouterr().out.splitlines()[-1] == "ended"


def test_a_process_whose_parent_is_killed_still_saves(monkeypatch, tmp_path):
    code = """asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
print("ready")
while not asked: time.sleep(0.01)
for _ in range(5000): print("more than a pipe holds, " * 10)
open(argv[0], "w").close()"""
    name = child(tmp_path, monkeypatch, code)
    parent = (
        "import sys\nfrom nanochat_hf.cli.stages import Processes, Screen\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "if __name__ == '__main__':\n"  # the fork server imports this file
        f"    Processes([]).run({name!r}, [{str(tmp_path / 'saved')!r}], Screen(terminal=False))\n"
    )
    (tmp_path / "parent.py").write_text(parent)
    run = Run(str(tmp_path / "parent.py"), [], tmp_path / "log")
    end = time.monotonic() + 240
    while "ready" not in run.text() and time.monotonic() < end:
        time.sleep(0.05)
    run.kill()
    while not (tmp_path / "saved").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert (tmp_path / "saved").exists(), run.text()


def test_the_rest_counts_steps_and_scales_everything_else(tmp_path):
    def stage(name, **settings):
        return Stage(name, "none", (), makes=tmp_path / name, **settings)

    stages = [
        stage("tokens", seconds=10),
        stage("base", steps=100, metrics=tmp_path / "base.jsonl"),
        stage("sft", steps=600, seconds=30),
        stage("finished", steps=50, seconds=1000),
        stage("evaluation", seconds=20),
    ]
    (tmp_path / "finished").mkdir()
    assert stages[1].step_times() == (0, [])
    entries = [{"step": 20, "val/bpb": 3.0}, *({"step": n, "train/step_seconds": n / 10} for n in (21, 22, 23))]
    (tmp_path / "base.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"step": 2')
    assert stages[1].step_times() == (23, [2.1, 2.2, 2.3])
    left = seconds_left(stages, stages[1], each=2.0, reference=0.5)
    assert left == {"base": 154.0, "sft": 1200 + 120.0, "evaluation": 80.0}
