"""Push a finished model to the Hub.

python -m nanochat_hf.cli.push_to_hub runs/sft --hub-model-id org/name
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nanochat_hf.config import parse, user_errors
from nanochat_hf.hub.card import CardFacts, read_results
from nanochat_hf.hub.client import check_repo_id
from nanochat_hf.hub.folder import lay_out, run_settings, write_card
from nanochat_hf.hub.push import HubPusher
from nanochat_hf.training.checkpoint import checkpoints


@dataclass(frozen=True)
class PushConfig:
    """What to push, and where to."""

    folder: str = field(
        metadata={"help": "a run's output folder, or a model folder; may stand first, without its flag"}
    )
    hub_model_id: str = field(metadata={"help": "repository: org/name, or name in your own namespace"})
    hub_private: bool = field(default=False, metadata={"help": "make the repository private where it is new"})
    hub_revision: str | None = field(
        default=None, metadata={"help": "branch to push to (default: main); made where it is new"}
    )
    with_checkpoint: bool = field(
        default=False, metadata={"help": "also push the newest checkpoint, to resume from elsewhere"}
    )
    results: str | None = field(
        default=None, metadata={"help": "JSON files of chat_eval or base_eval for the card, with commas"}
    )
    license: str | None = field(
        default=None, metadata={"help": "licence for the card (default: the present card's, else apache-2.0)"}
    )
    language: str | None = field(
        default=None, metadata={"help": "language code for the card (default: the present card's, else en)"}
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "list what would be pushed, and where to, without the network; the card's kept text is not there"
        },
    )


def locate(name: str) -> tuple[Path, Path]:
    """The model's folder and the run's folder, from a run's output folder or from a model's folder."""
    folder = Path(name)
    if (folder / "final").is_dir():
        return folder / "final", folder
    inside = folder.resolve().name == "final" or folder.name.startswith("checkpoint-")
    above = folder.resolve().parent
    return folder, above if inside and (above / "config.json").is_file() else folder


def show(config: PushConfig, model: Path, run: Path, checkpoint: Path | None, facts: CardFacts) -> None:
    """Print where the push would go, its files with their bytes, and the card, made as a push makes them."""
    with tempfile.TemporaryDirectory(prefix="hub-stage-") as folder:
        stage = lay_out(model, Path(folder) / "stage", run, checkpoint)
        write_card(stage, config.hub_model_id, settings=run_settings(run), revision=config.hub_revision, facts=facts)
        files = sorted(path for path in stage.rglob("*") if path.is_file())
        sizes = [path.stat().st_size for path in files]
        print(
            f"dry run, nothing is sent; repository {config.hub_model_id}, branch {config.hub_revision or 'main'}, "
            f"{'private' if config.hub_private else 'public'} where it is new, "
            f"{len(files)} files of {sum(sizes):,} bytes:"
        )
        for path, size in zip(files, sizes, strict=True):
            print(f"{size:>16,}  {path.relative_to(stage)}")
        print(f"\nREADME.md:\n\n{(stage / 'README.md').read_text(encoding='utf-8')}")


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Push, or show with --dry-run what a push would send. Exit code 1 if the push failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv = ["--folder", *argv]
    config, _ = parse([PushConfig], argv, description=__doc__)
    check_repo_id(config.hub_model_id)
    model, run = locate(config.folder)
    if not (model / "config.json").is_file():
        raise ValueError(
            f"{config.folder}: neither a run with final/ in it nor a model folder; give one that training wrote"
        )
    results = {k: v for path in (config.results or "").split(",") if path for k, v in read_results(path).items()}
    found = checkpoints(run)[-1:] if config.with_checkpoint else []
    if config.with_checkpoint and not found:
        raise ValueError(f"--with-checkpoint: no whole checkpoint in {run}; leave the flag out")
    checkpoint = found[0] if found else None
    facts = CardFacts(results, config.license, config.language)
    if config.dry_run:
        show(config, model, run, checkpoint, facts)
        return
    pusher = HubPusher(config.hub_model_id, private=config.hub_private, revision=config.hub_revision, say=print)
    pusher.submit(model, run_dir=run, checkpoint=checkpoint, facts=facts)
    sys.exit(0 if pusher.finish() else 1)


if __name__ == "__main__":
    main()
