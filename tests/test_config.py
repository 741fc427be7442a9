"""What a user caused ends in one line that says how to go on."""

from configparser import ConfigParser
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from nanochat_hf.config import EXTRAS, parse, user_errors


def raising(error):
    @user_errors
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("a\nb"), "error: a b"),
        (PermissionError(13, "Permission denied", "/x"), "error: [Errno 13] Permission denied: '/x'"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB. GPU 0 has"),
            "error: CUDA out of memory: it does not fit; lower --device-batch-size",
        ),
        (
            ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.figure"),
            "error: matplotlib is not installed; pip install 'nanochat_hf[plots]'\n",
        ),
    ],
)
def test_one_line_and_exit_code_2(error, said, capsys):
    with pytest.raises(SystemExit) as caught:
        raising(error)()
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and printed.startswith(said) and printed.count("\n") == 1


def test_a_host_without_room_says_so_too(capsys):
    @user_errors
    def main():
        torch.empty(10**17)

    with pytest.raises(SystemExit):
        main()
    assert "--gradient-checkpointing true" in capsys.readouterr().err


def test_faults_of_the_program_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        raising(RuntimeError("a bug"))()
    with pytest.raises(ModuleNotFoundError):
        raising(ModuleNotFoundError("No module named 'nanochat_hf.gone'", name="nanochat_hf.gone"))()


def test_the_extras_that_errors_name_bring_the_packages():
    setup = ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    for package, extra in EXTRAS.items():
        assert package in setup["options.extras_require"][extra], f"{extra} does not install {package}"
    required = setup["options"]["install_requires"]
    assert not [package for package in EXTRAS if package in required]


def test_ctrl_c_before_training_is_no_traceback(capsys):
    with pytest.raises(SystemExit) as caught:
        raising(KeyboardInterrupt())()
    assert caught.value.code == 130 and capsys.readouterr().err.strip() == "interrupted"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run_name: 2026", "2026"),
        ("matrix_lr: 1e-2", 0.01),
        ("eval_every: null", 150),
        ("compile: false", False),
        ("num_steps: 7", 7),
        ("num_steps: 2.5", "invalid int value: '2.5'"),
        ("keep: true", "invalid int value: 'True'"),
        ("device_batch_size: [4]", "device_batch_size: [4] must be a single value"),
    ],
)
def test_a_recipes_values_are_read_as_a_flags_are(text, expected, tmp_path, capsys):
    from nanochat_hf.training.config import PARTS

    (tmp_path / "r.yaml").write_text(text)
    argv, name = ["--config", str(tmp_path / "r.yaml"), "--output-dir", "x"], text.split(":")[0]
    if not isinstance(expected, str) or name == "run_name":
        *parts, _ = parse(PARTS, argv)
        (config,) = (part for part in parts if hasattr(part, name))
        assert getattr(config, name) == expected and type(getattr(config, name)) is type(expected)
    else:
        with pytest.raises(SystemExit) as caught:
            parse(PARTS, argv)
        assert caught.value.code == 2 and expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "argv", "said"),
    [
        ("warmup_step: 3", [], "unknown keys warmup_step (did you mean warmup_steps?); known are"),
        (
            "device-batch-size: 3\nzebra: 1",
            [],
            "unknown keys device-batch-size (did you mean device_batch_size?), zebra; known are",
        ),
        ("train_dat: []", [], "unknown keys train_dat (did you mean train_data?); known are"),
        (
            "seed: 1",
            ["--warmup-step", "3"],
            "unknown flags: --warmup-step (did you mean --warmup-steps?) 3; see --help",
        ),
        (
            "seed: 1",
            ["--Eval_Evry=3", "--zebra"],
            "unknown flags: --Eval_Evry=3 (did you mean --eval-every?) --zebra; see --help",
        ),
    ],
)
def test_an_unknown_name_is_told_with_the_one_it_resembles(recipe, argv, said, tmp_path, capsys):
    from nanochat_hf.training.config import PARTS

    (tmp_path / "r.yaml").write_text(recipe)
    with pytest.raises(SystemExit) as caught:
        parse(PARTS, ["--config", str(tmp_path / "r.yaml"), "--output-dir", "x", *argv], lists=("train_data",))
    assert caught.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


REFERENCE_FLAGS = (
    "run",
    "device-type",
    "dtype",
    "model-tag",
    "model-step",
    "num-iterations",
    "max-seq-len",
    "device-batch-size",
    "total-batch-size",
    "embedding-lr",
    "unembedding-lr",
    "matrix-lr",
    "weight-decay",
    "init-lr-frac",
    "eval-every",
    "eval-tokens",
    "dry-run",
    "smoke-test",
)


REFERENCE_RL_FLAGS = {
    "num-epochs",
    "examples-per-step",
    "num-samples",
    "device-batch-size",
    "max-new-tokens",
    "temperature",
    "top-k",
    "embedding-lr",
    "unembedding-lr",
    "matrix-lr",
    "weight-decay",
    "init-lr-frac",
    "eval-every",
    "eval-examples",
    "save-every",
}


def flags_of(section):
    """Flags of the original in the first column of a table of docs/flags.md, and ours in the second."""
    import re

    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    theirs = {flag for row in rows for flag in re.findall(r"`--([a-z-]+)", row[0])}
    ours = {flag for row in rows for flag in re.findall(r"--([a-z][a-z-]+[a-z])(?=[ `|]|\\\\)", row[1])}
    return theirs, ours - {"config_file", "hub"}


def test_every_flag_of_the_original_has_its_line_and_every_flag_named_there_exists():
    from dataclasses import fields
    from pathlib import Path

    from nanochat_hf.cli.chat_sft import SFTConfig
    from nanochat_hf.hub.push import HubConfig
    from nanochat_hf.training.callbacks.tasks import TaskEvalConfig
    from nanochat_hf.training.config import PARTS
    from nanochat_hf.training.rl_flags import RL_PARTS, ObjectiveConfig, RLConfig, RLTaskEval

    page = (Path(__file__).parents[1] / "docs" / "flags.md").read_text()
    sft, _, rl = page.partition("## nanochat's RL flags")
    for section, reference, kinds in (
        (sft, {*REFERENCE_FLAGS, "chatcore-every"}, (SFTConfig, *PARTS, TaskEvalConfig, HubConfig)),
        (rl, REFERENCE_RL_FLAGS, (RLConfig, ObjectiveConfig, *RL_PARTS, RLTaskEval, HubConfig)),
    ):
        theirs, ours = flags_of(section)
        assert theirs == reference
        known = {field.name.replace("_", "-") for kind in kinds for field in fields(kind)}
        assert ours and not ours - known, ours - known


@dataclass(frozen=True)
class Needs:
    model: str = field(metadata={"help": "a folder"})


def test_a_mistyped_flag_that_must_be_given_is_named(capsys):
    with pytest.raises(SystemExit):
        parse([Needs], ["--modell", "x"])
    assert "unknown flags: --modell (did you mean --model?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, words", [(["--model"], "expected one argument; see --help"), ([], "required: --model; see --help")]
)
def test_a_wrong_command_line_is_answered_in_one_line(argv, words, capsys):
    with pytest.raises(SystemExit):
        parse([Needs], argv)
    message = capsys.readouterr().err
    assert message.endswith(f"{words}\n") and message.count("\n") == 1
