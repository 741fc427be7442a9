"""The folder that a push uploads: hard links to the model and its checkpoint, with card, curves and configuration."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from nanochat_hf.training.report import curves as draw_curves
from nanochat_hf.training.tracking import read_metrics

from .card import CardFacts, card_data, kept_text, public, results_of
from .card_text import Card, card_body

# how the names of a checkpoint's files begin that are not the model's
STATE_FILES = ("trainer.json", "checksums.json", "rank")
LAST = "last-checkpoint"


def scrub(text: str) -> str:
    """`text` without the user's token, in case an error message quotes it."""
    token = get_token()
    # anything shorter is no token of the Hub, but may be part of many words
    return text.replace(token, "***") if token and len(token) > 7 else text


def stage_model(folder: str | Path, target: str | Path, *, checkpoint: str | Path | None = None) -> Path:
    """Link the model of `folder`, and `checkpoint` as last-checkpoint/, into the new folder `target`; returns it.

    Hard links keep the files when training deletes an old checkpoint. Code files that an older export lacks are added,
    so that the model loads without this package. Raises ValueError if `folder` holds no model.
    """
    folder, target = Path(folder), Path(target)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder}: no config.json with *.safetensors, so no model folder; give a folder that training exported"
        )
    target.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith((*STATE_FILES, ".")) and path.suffix != ".pt":
            _link(path, target / path.name)
    for code in (Path(__file__).parents[1] / "model").glob("*_nanochat_hf.py"):
        if not (target / code.name).exists():
            shutil.copy2(code, target)
    if checkpoint:
        (target / LAST).mkdir()
        for path in Path(checkpoint).iterdir():
            _link(path, target / LAST / path.name)
    return target


def lay_out(folder: str | Path, target: str | Path, run_dir: str | Path, checkpoint: str | Path | None = None) -> Path:
    """Do `stage_model`, and add the metrics of the run in `run_dir` if it has any; returns `target`."""
    stage = stage_model(folder, target, checkpoint=checkpoint)
    if (Path(run_dir) / "metrics.jsonl").is_file():
        shutil.copy2(Path(run_dir) / "metrics.jsonl", stage)
    return stage


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def run_settings(run_dir: str | Path) -> dict[str, Any]:
    """The resolved configuration that training wrote into its output folder; empty if there is none."""
    path = Path(run_dir) / "config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {} if "model_type" in found else found


def write_card(
    stage: Path,
    repo_id: str,
    *,
    settings: Mapping[str, Any],
    facts: CardFacts | None = None,
    revision: str | None = None,
    existing: Callable[[], str | None] = lambda: None,
) -> None:
    """Write README.md, curves.png and training_config.json into the staged folder.

    `existing` fetches the card that is there already, or None.
    """
    log, facts = stage / "metrics.jsonl", facts or CardFacts()
    metrics, present = read_metrics(log) if log.is_file() else [], existing()
    figures = results_of(metrics, facts.results)
    data = card_data(repo_id, settings, figures, present, facts)
    # these may be hard links to a file elsewhere: never write through them
    (stage / "curves.png").unlink(missing_ok=True)
    (stage / "README.md").unlink(missing_ok=True)
    card = Card(
        repo_id,
        stage,
        settings,
        metrics,
        figures,
        revision=revision,
        curves=draw_curves(metrics, stage / "curves.png"),
        checkpoint=(stage / LAST).is_dir(),
        kept=kept_text(present),
    )
    (stage / "README.md").write_text(scrub(f"---\n{data.to_yaml()}\n---\n\n{card_body(card)}"), encoding="utf-8")
    (stage / "training_config.json").write_text(
        scrub(json.dumps(public(settings), indent=2, default=str)) + "\n", encoding="utf-8"
    )
