"""What lands on the Hub: a folder of hard links to the model and its checkpoint, with card, curves and configuration beside them."""

import json
import os
import shutil
from pathlib import Path

from huggingface_hub import get_token

from nanochat_hf.training.report import curves as draw_curves
from nanochat_hf.training.tracking import read_metrics

from .card import card_data, kept_text, public, results_of
from .card_text import card_body

STATE_FILES = ("trainer.json", "checksums.json", "rank")  # what a checkpoint has beside the model
LAST = "last-checkpoint"


def scrub(text):
    """`text` without the token, should it ever have come in."""
    token = get_token()
    return (
        text.replace(token, "***") if token and len(token) > 7 else text
    )  # shorter is no token of the Hub, but a part of many words


def stage_model(folder, target, *, checkpoint=None):
    """Lay the model of `folder`, and `checkpoint` as last-checkpoint/, out in `target`, by hard links: pruning cannot take them away.

    Code files that an older export lacks are added, so that the model loads where this package is not installed.
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


def lay_out(folder, target, run_dir, checkpoint=None):
    """stage_model, and the metrics of the run in `run_dir` beside it, where it has any; returns `target`."""
    stage = stage_model(folder, target, checkpoint=checkpoint)
    if (Path(run_dir) / "metrics.jsonl").is_file():
        shutil.copy2(Path(run_dir) / "metrics.jsonl", stage)
    return stage


def _link(source, target):
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def run_settings(run_dir):
    """The resolved configuration that training wrote into its output folder; {} where there is none."""
    path = Path(run_dir) / "config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {} if "model_type" in found else found


def write_card(
    stage, repo_id, *, settings, results=None, revision=None, existing=lambda: None, license=None, language=None
):
    """Write README.md, curves.png and training_config.json into the staged model folder; existing() gives the card there is, or None."""
    log = stage / "metrics.jsonl"
    metrics, present = read_metrics(log) if log.is_file() else [], existing()
    figures = results_of(metrics, results)
    data = card_data(repo_id, settings, figures, present, license, language)
    (stage / "curves.png").unlink(missing_ok=True)  # as README.md below
    curves = draw_curves(metrics, stage / "curves.png")
    body = card_body(
        repo_id,
        stage,
        settings,
        metrics,
        figures,
        revision=revision,
        curves=curves,
        checkpoint=(stage / LAST).is_dir(),
        kept=kept_text(present),
    )
    (stage / "README.md").unlink(missing_ok=True)  # a hard link to the original: never write through it
    (stage / "README.md").write_text(scrub(f"---\n{data.to_yaml()}\n---\n\n{body}"), encoding="utf-8")
    (stage / "training_config.json").write_text(
        scrub(json.dumps(public(settings), indent=2, default=str)) + "\n", encoding="utf-8"
    )
