"""Trackers (W&B, trackio, TensorBoard): started before any data is prepared, and continued by a run that is resumed."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .checkpoint import step_of, trackers_of
from .tracking import TrackConfig

REMEDIES = {
    "wandb": "run `wandb login`, or set WANDB_MODE=offline, or leave the flag out",
    "trackio": "check the network, or leave the flag out",
    "tensorboard": "free space in the output folder, or leave the flag out",
}


def refuse_missing(names: tuple[str, ...]) -> None:
    """ValueError where the package of a tracker is not installed.

    Accelerate would leave the tracker out without a word.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"--report-to {name}: the package is not installed; "
                "pip install 'nanochat_hf[tracking]', or leave the flag out"
            )


def start(accelerator: Accelerator, config: TrackConfig, run: str, resumed: Path | None) -> None:
    """Start the trackers on the main process, each as the run that `resumed`, a checkpoint, was part of.

    `run` names it beside other runs of the project. ValueError where one cannot start: no login, no network, no room.
    """
    before, wanted = trackers_of(resumed), list(accelerator.log_with)
    for kind in wanted:  # one by one, so that the one that cannot start is known
        name, accelerator.log_with = str(kind), [kind]
        try:
            accelerator.init_trackers(config.run_name, init_kwargs={name: arguments(name, before, run, resumed)})
        except Exception as error:  # each library raises kinds of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"--report-to {name}: cannot start ({reason[:300]}); {REMEDIES[name]}") from None
        finally:
            accelerator.log_with = wanted


def arguments(name: str, before: Mapping[str, str], run: str, resumed: Path | None) -> dict[str, Any]:
    """What the tracker's own start is given: {"id": …, "resume": "allow"} for a W&B run that goes on.

    >>> arguments("wandb", {"wandb": "x1"}, "sft", Path("checkpoint-000004"))
    {'id': 'x1', 'resume': 'allow'}
    >>> arguments("tensorboard", {}, "sft", Path("checkpoint-000004"))
    {'purge_step': 5}
    """
    if name == "wandb":
        return {"id": before["wandb"], "resume": "allow"} if "wandb" in before else {}
    if name == "trackio":
        return {"name": before.get("trackio", run), "resume": "allow" if "trackio" in before else "never"}
    # what was logged after the checkpoint is logged again: TensorBoard hides the first of both from this step on
    return {"purge_step": step_of(resumed) + 1} if resumed else {}


def identities(accelerator: Accelerator) -> dict[str, str]:
    """{tracker: what a resumed run continues it by}, on the main process; {} elsewhere."""
    if not accelerator.is_main_process:
        return {}
    attribute = {"wandb": "id", "trackio": "name"}
    named = [tracker for tracker in accelerator.trackers if tracker.name in attribute]
    return {tracker.name: str(getattr(tracker.tracker, attribute[tracker.name])) for tracker in named}


def describe(accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
    """Give the trackers the settings of the run."""
    for tracker in accelerator.trackers:
        tracker.store_init_configuration(flat(settings))


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them: numbers, booleans and text as they are, the rest as text.

    >>> flat({"seed": 1, "data": ["a"], "resume": None})
    {'seed': 1, 'data': "['a']", 'resume': 'None'}
    """
    plain = int | float | str | bool
    return {key: value if isinstance(value, plain) else str(value) for key, value in settings.items()}


def finish(accelerator: Accelerator) -> None:
    """End the trackers of a run that ends early."""
    for tracker in accelerator.trackers:
        tracker.finish()
