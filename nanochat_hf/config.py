"""Configuration: frozen dataclasses, filled first from a recipe (YAML), then from the command line, which wins."""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
import yaml
from transformers import HfArgumentParser

from nanochat_hf.errors import is_consequence, say_error
from nanochat_hf.interrupts import Terminated, interruptible

# optional packages, and the extra of this package that installs each
EXTRAS = {
    "cudnn": "cudnn",
    "matplotlib": "plots",
    "starlette": "web",
    "tensorboard": "tracking",
    "tiktoken": "eval",
    "trackio": "tracking",
    "uvicorn": "web",
    "wandb": "tracking",
}
P = ParamSpec("P")
R = TypeVar("R")
SMALLER = (
    "it does not fit; lower --device-batch-size (with --total-batch-size the step stays the same), "
    "give --gradient-checkpointing true, lower --max-seq-len, "
    "or split the model over GPUs with accelerate_configs/fsdp2.yaml"
)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read a YAML recipe. Raises ValueError, naming the file, if it is missing, malformed or not a mapping."""
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


def parse(
    types: Sequence[Any],
    argv: Sequence[str] | None = None,
    *,
    lists: Sequence[str] = (),
    description: str | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Any, ...]:
    """Parse `types` (frozen dataclasses) from `--config recipe.yaml` and from flags; flags win over the recipe.

    `argv` is the command line by default. `lists` names recipe keys that hold lists of mappings (data sets); they have
    no flag. `presets` are named recipes, {name: {flag: value}}, that `--recipe NAME` (or that key of the YAML file)
    puts in the place of the defaults; keys without a flag here are left out.

    Returns one instance per type, then one dict with those lists. An unknown flag, an unknown recipe key and a value
    that a dataclass refuses end the program with exit code 2 and one line on stderr.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(types, description=description, allow_abbrev=False)
    parser.error = functools.partial(_refuse, parser)
    parser.add_argument("--config", help="recipe (YAML) whose keys are the flags' names; flags win over it")
    path = _argument(argv, "--config")
    _apply_preset(parser, argv, path, presets or {})
    extras = {} if path is None else _apply_recipe(parser, path, types, lists)
    values = vars(_known_flags(parser, argv))
    try:
        configs = [kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init}) for kind in types]
    except ValueError as error:
        parser.error(str(error))
    return *configs, extras


def _apply_recipe(
    parser: argparse.ArgumentParser, path: str, types: Sequence[Any], lists: Sequence[str]
) -> dict[str, Any]:
    # The recipe's single values become the parser's defaults; its lists are returned.
    try:
        recipe = read_recipe(path)
    except ValueError as error:
        parser.error(str(error))
    extras = {key: recipe.pop(key) for key in lists if key in recipe}
    known = {field.name for kind in types for field in dataclasses.fields(kind)}
    unknown = sorted(set(recipe) - known)
    if unknown:
        known |= set(lists)
        parser.error(f"--config {path}: unknown keys {guessed(unknown, known)}; known are {', '.join(sorted(known))}")
    single = {key: value for key, value in recipe.items() if value is not None}  # null means the default
    for key, value in single.items():
        if isinstance(value, list | dict):
            parser.error(f"--config {path}: {key}: {value!r} must be a single value, as after its flag")
    # as text, so that argparse reads and refuses a recipe's value just as it does a flag's
    texts = {key: str(value) for key, value in single.items()}
    for action in parser._actions:
        if action.dest in texts:  # the recipe answers a required flag
            action.required = False
    parser.set_defaults(**texts)
    return extras


def _known_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    flags = {flag for flag in parser._option_string_actions if flag.startswith("--") and "_" not in flag}
    given = {word.partition("=")[0] for word in argv if word.startswith("--")}
    mistyped = sorted(given - set(parser._option_string_actions))
    if mistyped and any(action.required and given.isdisjoint(action.option_strings) for action in parser._actions):
        # argparse would only say that a required flag is missing
        parser.error(f"unknown flags: {guessed(mistyped, flags, ' ')}; see --help")
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unknown flags: {guessed(unknown, flags, ' ')}; see --help")
    return argparse.Namespace(**{name: _at_home(value) for name, value in vars(namespace).items()})


def _at_home(value: Any) -> Any:
    """A path that begins with "~" in the home folder, which no shell has put there for a recipe or for --data=~/x."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    # Without the usage: thirty lines of flags would hide the one that matters. argparse's own messages name no remedy.
    say_error(f"{parser.prog}: error: {message if ';' in message else f'{message}; see --help'}")
    sys.exit(2)


def guessed(names: Iterable[str], known: Iterable[str], separator: str = ", ") -> str:
    """Unknown names as text, each with the known name that it resembles.

    >>> guessed(["sed", "x"], ["seed"])
    'sed (did you mean seed?), x'
    """
    told = []
    for name in names:
        head = name.partition("=")[0]
        written = head.replace("_", "-") if head.startswith("--") else head
        near = difflib.get_close_matches(written, sorted(known), n=1, cutoff=0.7)
        told.append(f"{name} (did you mean {near[0]}?)" if near else name)
    return separator.join(told)


def _apply_preset(
    parser: argparse.ArgumentParser, argv: Sequence[str], path: str | None, presets: Mapping[str, Mapping[str, Any]]
) -> None:
    # the defaults of a named recipe, under those of the YAML file
    name = _argument(argv, "--recipe")
    if not presets:
        return
    if name is None and path is not None and Path(path).is_file():
        with contextlib.suppress(ValueError):  # a file that cannot be read is refused later
            name = read_recipe(path).get("recipe")
    if name is None:
        return
    if name not in presets:
        parser.error(f"--recipe {name} is unknown; choose from {', '.join(presets)}")
    flags = {action.dest for action in parser._actions}
    parser.set_defaults(
        **{key: str(value) for key, value in presets[name].items() if key in flags and value is not None}
    )


def _argument(argv: Sequence[str], flag: str) -> str | None:
    for index, argument in enumerate(argv):
        if argument == flag and index + 1 < len(argv):
            return argv[index + 1]
        if argument.startswith(f"{flag}="):
            return argument.split("=", 1)[1]
    return None


def resolved(*configs: Any, **extras: Any) -> dict[str, Any]:
    """One flat dict of every setting of some dataclasses and of `extras`: printed, and saved with each checkpoint."""
    return {key: value for config in configs for key, value in dataclasses.asdict(config).items()} | extras


def dump(path: str | Path, settings: Mapping[str, Any]) -> None:
    """Write `settings` as JSON; a value that JSON does not know becomes text."""
    Path(path).write_text(json.dumps(settings, indent=2, default=str) + "\n")


def imported(name: str, said: str) -> Any:
    """What "package.module:NAME" names, looked for in the working directory too.

    ValueError where it cannot be imported; the message begins with `said`, the flag or key that named it.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module of the user's may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{said}: cannot be imported ({reason[:200]}); correct the name or the file") from None


def user_errors(main: Callable[P, R]) -> Callable[P, R]:
    """Decorate a script's main, so that an error a user can cause ends in one line on stderr and exit code 2.

    These are ValueError, OSError, a lack of memory, and an optional package that is not installed; any other
    exception is ours and keeps its traceback. If several processes meet the same error, the main one reports it.
    Ctrl-C ends with code 130 and SIGTERM with 143, in one line too; during training they save instead (see
    training/stopping.py).
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with interruptible():
                return main(*args, **kwargs)
        except (ValueError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            say_error(f"error: {' '.join(str(error).split())}")
            sys.exit(2)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in EXTRAS:
                raise
            say_error(f"error: {package} is not installed; pip install 'nanochat_hf[{EXTRAS[package]}]'")
            sys.exit(2)
        except (KeyboardInterrupt, Terminated) as error:
            told, code = ("\ninterrupted", 130) if isinstance(error, KeyboardInterrupt) else ("terminated", 143)
            if os.environ.get("RANK", "0") == "0":
                print(told, file=sys.stderr)
            sys.exit(code)
        except RuntimeError as error:
            if is_consequence(error):  # the process that failed has said why
                sys.exit(2)
            if not out_of_memory(error):
                raise
            reason = str(error).split(". ")[0]
            say_error(f"error: {' '.join(reason.split())}: {SMALLER}")
            sys.exit(2)

    return wrapped


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no memory left. The host raises a plain RuntimeError for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def at_least(config: Any, least: int, *names: str) -> None:
    """ValueError where one of the named fields is below `least`."""
    for name in names:
        if getattr(config, name) < least:
            off = "; 0 is off" if least == 0 else ""
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} must be at least {least}{off}")
