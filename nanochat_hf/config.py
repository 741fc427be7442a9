"""Configuration: frozen dataclasses, filled from a recipe (YAML) and then from the command line, which wins."""

import dataclasses
import difflib
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser

from nanochat_hf.errors import say_error

SMALLER = (
    "it does not fit; lower --device-batch-size (with --total-batch-size the step stays the same), give --gradient-checkpointing true, lower "
    "--max-seq-len, or split the model over GPUs with accelerate_configs/fsdp2.yaml"
)


def read_recipe(path):
    """Read a YAML recipe into a dict; ValueError names the file where it is missing, malformed or not a mapping."""
    try:
        recipe = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"--config {path}: cannot be read ({error.strerror}); give an existing YAML file") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--config {path}: not valid YAML ({reason}); correct that line") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"--config {path}: holds {type(recipe).__name__}, must be a mapping of flag names to values")
    return recipe


def parse(types, argv=None, *, lists=(), description=None):
    """Parse `types` (frozen dataclasses) from `--config recipe.yaml` and flags; flags win over the recipe.

    `lists` names recipe keys that hold lists of mappings (data sets) and have no flag. Returns one instance per type,
    then one dict with those lists. Unknown flags and unknown recipe keys end the program with exit code 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(types, description=description, allow_abbrev=False)
    parser.error = functools.partial(_refuse, parser)
    parser.add_argument(
        "--config", default=None, help="recipe (YAML) whose keys are the flags' names; flags win over it"
    )
    extras = {}
    config_path = _config_argument(argv)
    if config_path is not None:
        try:
            recipe = read_recipe(config_path)
        except ValueError as error:
            parser.error(str(error))
        extras = {key: recipe.pop(key) for key in lists if key in recipe}
        known = {field.name for kind in types for field in dataclasses.fields(kind)}
        unknown = sorted(set(recipe) - known)
        if unknown:
            parser.error(
                f"--config {config_path}: unknown keys {guessed(unknown, known | set(lists))}; known are {', '.join(sorted(known | set(lists)))}"
            )
        single = {key: value for key, value in recipe.items() if value is not None}  # null: the default
        for key, value in single.items():
            if isinstance(value, list | dict):
                parser.error(f"--config {config_path}: {key}: {value!r} must be a single value, as after its flag")
        recipe = {
            key: str(value) for key, value in single.items()
        }  # argparse then reads and refuses them as it does a flag's
        for action in parser._actions:  # a recipe answers required flags
            if action.dest in recipe:
                action.required = False
        parser.set_defaults(**recipe)
    flags = {flag for flag in parser._option_string_actions if flag.startswith("--") and "_" not in flag}
    given = {word.partition("=")[0] for word in argv if word.startswith("--")}
    mistyped = sorted(given - set(parser._option_string_actions))
    if mistyped and any(action.required and given.isdisjoint(action.option_strings) for action in parser._actions):
        parser.error(
            f"unknown flags: {guessed(mistyped, flags, ' ')}; see --help"
        )  # argparse would say only that one is missing
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unknown flags: {guessed(unknown, flags, ' ')}; see --help")
    values = {key: _at_home(value) for key, value in vars(namespace).items()}
    try:
        configs = [kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init}) for kind in types]
    except ValueError as error:
        parser.error(str(error))
    return *configs, extras


def _at_home(value):
    """A path that begins with "~" in the home folder, which no shell has put there for a recipe or for --data=~/x."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def _refuse(parser, message):
    # without the usage, 30 lines of flags above the one that matters; argparse's own words name no remedy
    say_error(f"{parser.prog}: error: {message if ';' in message else f'{message}; see --help'}")
    sys.exit(2)


def guessed(names, known, separator=", "):
    """Names that are none of the known, each with the one it resembles: guessed(["sed", "x"], ["seed"]) → "sed (did you mean seed?), x"."""
    told = []
    for name in names:
        head = name.partition("=")[0]
        written = head.replace("_", "-") if head.startswith("--") else head
        near = difflib.get_close_matches(written, sorted(known), n=1, cutoff=0.7)
        told.append(f"{name} (did you mean {near[0]}?)" if near else name)
    return separator.join(told)


def _config_argument(argv):
    for index, argument in enumerate(argv):
        if argument == "--config" and index + 1 < len(argv):
            return argv[index + 1]
        if argument.startswith("--config="):
            return argument.split("=", 1)[1]
    return None


def resolved(*configs, **extras):
    """One flat dict of everything that was chosen, to print and to save with every checkpoint."""
    return {k: v for config in configs for k, v in dataclasses.asdict(config).items()} | extras


def dump(path, settings):
    """Write `settings` (a dict) as JSON."""
    Path(path).write_text(json.dumps(settings, indent=2, default=str) + "\n")


def user_errors(main):
    """Decorate a script's main: what a user caused ends in one line on stderr and exit code 2, without a traceback.

    Of several processes that meet the same error the main one says it."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except (ValueError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            say_error(f"error: {' '.join(str(error).split())}")
            sys.exit(2)
        except KeyboardInterrupt:  # once training runs, Ctrl-C saves (stopping.StopSignal)
            if os.environ.get("RANK", "0") == "0":
                print("\ninterrupted", file=sys.stderr)
            sys.exit(130)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            reason = str(error).split(". ")[0]
            say_error(f"error: {' '.join(reason.split())}: {SMALLER}")
            sys.exit(2)

    return wrapped


def out_of_memory(error):
    """Whether a device, or the host ("can't allocate memory" in a plain RuntimeError), had no room."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def at_least(config: Any, least: int, *names: str) -> None:
    """ValueError where one of the named fields is below `least`."""
    for name in names:
        if getattr(config, name) < least:
            off = "; 0 is off" if least == 0 else ""
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} must be at least {least}{off}")
