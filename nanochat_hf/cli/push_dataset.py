"""Publish a data set as training uses it.

python -m scripts.push_dataset --hub-dataset-id org/chats --data chats.jsonl --tokenizer DIR
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError

from nanochat_hf.config import parse, user_errors
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.hub.dataset import SetFacts, dataset_card, tokenised_rows, write_dataset
from nanochat_hf.hub.push import check_repo_id, connect, fetch_model, reason, retried
from nanochat_hf.tokenizer import load_tokenizer


@dataclass(frozen=True)
class PublishConfig:
    """Which data, tokenised by what, and where to.

    A recipe (--config) may list several sources as train_data and validation_data.
    """

    hub_dataset_id: str = field(metadata={"help": "repository: org/name, or name in your own namespace"})
    data: str | None = field(default=None, metadata={"help": "a Hub name or a file"})
    validation: str | None = field(default=None, metadata={"help": "held-out data, as --data"})
    tokenizer: str | None = field(
        default=None, metadata={"help": "folder or Hub name; adds input_ids (and assistant_masks)"}
    )
    kind: str = field(default="chat", metadata={"help": "chat: conversations; text: documents"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    private: bool = field(default=False, metadata={"help": "make the repository private where it is new"})
    license: str | None = field(
        default=None, metadata={"help": "licence for the card (default: the present card's, else other)"}
    )
    language: str | None = field(
        default=None, metadata={"help": "language code for the card (default: the present card's, else en)"}
    )

    def __post_init__(self) -> None:
        if self.kind not in ("chat", "text"):
            raise ValueError(f"--kind {self.kind} must be chat or text")
        check_repo_id(self.hub_dataset_id, "--hub-dataset-id")


def sources(config: PublishConfig, lists: Mapping[str, Any]) -> dict[str, list[SourceConfig]]:
    """The sources of each split, {"train": […], "validation": […]}, without splits that have none.

    `lists` holds the recipe's train_data and validation_data; a flag wins over them. ValueError without any training
    data.
    """
    found = {
        split: SourceConfig.from_recipe_list(lists.get(f"{split}_data"), f"{split}_data")
        for split in ("train", "validation")
    }
    for split, path in (("train", config.data), ("validation", config.validation)):
        found[split] = [SourceConfig(path=path)] if path else found[split]
    if not found["train"]:
        raise ValueError("no data; give --data or a recipe with train_data")
    return {split: listed for split, listed in found.items() if listed}


def existing_card(api: HfApi, repo_id: str) -> str | None:
    """The text of the card that is on the Hub, None where there is none."""
    try:
        return Path(api.hf_hub_download(repo_id, "README.md", repo_type="dataset", force_download=True)).read_text(
            encoding="utf-8"
        )
    except RemoteEntryNotFoundError:
        return None


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Write the rows into a temporary folder, add the card, upload both. A push that fails ends with exit code 1."""
    config, lists = parse([PublishConfig], argv, lists=("train_data", "validation_data"), description=__doc__)
    found = sources(config, lists)
    tokenizer = load_tokenizer(fetch_model(config.tokenizer)) if config.tokenizer else None
    api, repo_id = connect(config.hub_dataset_id, private=config.private, repo_type="dataset")
    with tempfile.TemporaryDirectory(prefix="hub-dataset-") as folder:
        rows = {
            split: (
                r
                for s in listed
                for r in tokenised_rows(s, tokenizer, kind=config.kind, text_column=config.text_column)
            )
            for split, listed in found.items()
        }
        counts = write_dataset(rows, folder)
        facts = SetFacts(
            kind=config.kind,
            tokenizer_name=config.tokenizer,
            sources=[str(s.task or s.path) for listed in found.values() for s in listed],
            license=config.license,
            language=config.language,
        )
        try:
            existing = retried(lambda: existing_card(api, repo_id))
            card = dataset_card(repo_id, counts, facts, existing)
            (Path(folder) / "README.md").write_text(card, encoding="utf-8")
            commit = retried(
                lambda: api.upload_folder(
                    folder_path=folder,
                    repo_id=repo_id,
                    repo_type="dataset",
                    commit_message="Publish data set",
                    delete_patterns="data/*",
                )
            )
        except Exception as error:
            print(f"error: push to {repo_id}: {reason(error)}; run the same command again", file=sys.stderr)
            sys.exit(1)
    told = ", ".join(f"{count['rows']:,} rows of {split}" for split, count in counts.items())
    print(f"pushed {told} to {commit.commit_url}; train on it with --data {repo_id}")


if __name__ == "__main__":
    main()
