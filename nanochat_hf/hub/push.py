"""To the Hub and back: push a model in the background, and fetch models and checkpoints by name."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from huggingface_hub import CommitInfo, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import disable_progress_bars
from tqdm import tqdm

from .card import CardFacts, hub_name
from .client import check_repo_id, connect, one_line, reason, retried
from .folder import LAST, lay_out, run_settings, write_card

STRATEGIES = ("end", "every_save", "checkpoint")
NO_MODEL = [f"{LAST}/*", "checkpoint-*", "*.pt", "*.bin", "*.png", "metrics.jsonl"]


@dataclass(frozen=True)
class HubConfig:
    """Whether, where and when to push. The token comes from `hf auth login` or HF_TOKEN, never from a configuration."""

    push_to_hub: bool = field(
        default=False, metadata={"help": "upload to the Hub, in the background, while training goes on"}
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "repository to push to: org/name, or name in your own namespace"}
    )
    hub_private: bool = field(default=False, metadata={"help": "make the repository private where it is new"})
    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "end: the final model; every_save: the model at each checkpoint; "
            "checkpoint: also the state to resume from"
        },
    )
    hub_revision: str | None = field(
        default=None, metadata={"help": "branch to push to (default: main); made where it is new"}
    )

    def __post_init__(self):
        if self.hub_strategy not in STRATEGIES:
            raise ValueError(f"--hub-strategy {self.hub_strategy} must be one of {', '.join(STRATEGIES)}")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("--push-to-hub needs a repository; add --hub-model-id org/name")
        if self.hub_model_id and not self.push_to_hub:
            raise ValueError(
                f"--hub-model-id {self.hub_model_id} without --push-to-hub pushes nothing; "
                "add --push-to-hub or leave it out"
            )
        if self.hub_model_id:
            check_repo_id(self.hub_model_id)


class HubPusher:
    """Pushes model folders to one repository, one after another, in a thread of huggingface_hub.

    A push that fails is tried again, then reported in one line through `say`; nothing is raised. If pushes have to wait
    for one that runs, only the newest of them is kept. Use it in one process, and call `finish` before that ends.
    `wait`: seconds before the second attempt. Raises ValueError as `connect`.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        private: bool = False,
        strategy: str = "end",
        revision: str | None = None,
        wait: float = 5.0,
        say: Callable[[str], object] = tqdm.write,
    ):
        self.strategy, self.revision, self.wait, self.say = strategy, revision, wait, say
        self.api, self.repo_id = connect(repo_id, private=private, revision=revision, wait=wait)
        self.jobs: list[tuple[Future[None], Path]] = []
        self.failure: str | None = None
        self.scratch: Path | None = None

    @classmethod
    def from_config(cls, config: HubConfig, *, idle: bool = False) -> "HubPusher | None":
        """The pusher that a HubConfig asks for, logged in, or None. Raises ValueError before any long work.

        Ranks other than 0 get None, and so does an `idle` run, which writes no model.
        """
        if config.hub_model_id is None:
            return None
        # every launcher of several processes sets RANK, except XLA's, where a second login does no harm
        if idle or not config.push_to_hub or os.environ.get("RANK", "0") != "0":
            return None
        disable_progress_bars()  # the bars of uploads would break up that of training
        return cls(
            config.hub_model_id, private=config.hub_private, strategy=config.hub_strategy, revision=config.hub_revision
        )

    def submit(
        self,
        folder: str | Path,
        *,
        run_dir: str | Path | None = None,
        checkpoint: str | Path | None = None,
        facts: CardFacts | None = None,
        message: str = "Push model",
    ) -> None:
        """Push the model in `folder` in the background. `run_dir` holds config.json and metrics.jsonl of the run."""
        try:
            stage = lay_out(folder, self._scratch(run_dir) / uuid4().hex, run_dir or folder, checkpoint)
            settings = run_settings(run_dir or folder)
            while self.jobs and self.jobs[-1][0].cancel():
                shutil.rmtree(self.jobs.pop()[1], ignore_errors=True)
            future = self.api.run_as_future(self._push, stage, settings, facts, message, str(folder))
            self.jobs.append((future, stage))
        except Exception as error:  # a full disk must not end the run
            self._failed(message, str(folder), error)

    def _scratch(self, run_dir: str | Path | None) -> Path:
        if self.scratch is None:
            self.scratch = self._beside(run_dir) or Path(tempfile.mkdtemp(prefix="hub-stage-"))
        return self.scratch

    @staticmethod
    def _beside(run_dir: str | Path | None) -> Path | None:
        # a folder on the run's own file system, where hard links work; None if it cannot be made
        if run_dir is None:
            return None
        scratch = Path(run_dir) / ".hub-stage"
        shutil.rmtree(scratch, ignore_errors=True)  # left behind by a run that was killed
        try:
            scratch.mkdir()
        except OSError:
            return None
        return scratch

    def _push(self, stage: Path, settings: dict[str, Any], facts: CardFacts | None, message: str, folder: str) -> None:
        try:
            write_card(
                stage,
                self.repo_id,
                settings=settings,
                facts=facts,
                revision=self.revision,
                existing=lambda: retried(self._existing_card, wait=self.wait),
            )
            commit = retried(lambda: self._upload(stage, message), wait=self.wait)
            self.failure = None
            self.say(f"pushed to {commit.commit_url} ({message})")
        except Exception as error:
            self._failed(message, folder, error)
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _upload(self, stage: Path, message: str) -> CommitInfo:
        # a checkpoint replaces the older one whole: that may come from another number of processes
        stale = f"{LAST}/*" if (stage / LAST).is_dir() else None
        return self.api.upload_folder(
            repo_id=self.repo_id,
            folder_path=stage,
            commit_message=message,
            revision=self.revision,
            delete_patterns=stale,
        )

    def _existing_card(self) -> str | None:
        try:  # always downloaded: a cached card could be older than what a person wrote since
            path = self.api.hf_hub_download(self.repo_id, "README.md", revision=self.revision, force_download=True)
        except RemoteEntryNotFoundError:  # there is no card; a Hub out of reach is another error
            return None
        return Path(path).read_text(encoding="utf-8")

    def _failed(self, message: str, folder: str, error: BaseException) -> None:
        self.failure = reason(error)
        remedy = f"python -m scripts.push_to_hub {folder} --hub-model-id {self.repo_id}"
        self.say(
            f"push to {self.repo_id} failed ({message}): {self.failure}; "
            f"{folder} is whole, push it later with: {remedy}"
        )

    def finish(self) -> bool:
        """Wait for the pushes under way. Returns whether the last one arrived."""
        for future, _ in self.jobs:
            try:
                future.result()
            except CancelledError:
                continue
            except KeyboardInterrupt:  # an ordinary exit would wait for the client's thread, which may hang
                self.say(
                    f"push to {self.repo_id} interrupted; the model's folder is whole, "
                    "push it later with scripts.push_to_hub"
                )
                sys.stdout.flush()
                os._exit(130)
        self.jobs.clear()
        if self.scratch:
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch = None
        return self.failure is None


def fetch_model(name: str) -> str:
    """The folder of a model: an existing folder as it is, or "org/name[@revision]" downloaded, without pickles.

    Raises ValueError if it is neither.
    """
    if Path(str(name)).is_dir():
        return str(name)
    folder = _fetch(name, "--model", ignore_patterns=NO_MODEL)
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {name}: that repository has no config.json, so no model; give another name")
    return str(folder)


def fetch_checkpoint(name: str | None) -> str | None:
    """A checkpoint for --resume: None, "auto" and folders as they are; "org/name[@revision]" downloaded.

    Raises ValueError if the repository has no last-checkpoint/, and if loading it would run code from the Hub.
    """
    if name is None or name == "auto" or Path(str(name)).is_dir() or not hub_name(name):
        return name
    folder = _fetch(name, "--resume", allow_patterns=[f"{LAST}/*"]) / LAST
    if not (folder / "trainer.json").is_file():
        raise ValueError(f"--resume {name}: that repository has no {LAST}/; push with --hub-strategy checkpoint")
    for path in sorted(folder.glob("*.pt")):
        _refuse_code(path, name)
    return str(folder)


def _fetch(name: str, flag: str, **patterns: Any) -> Path:
    found = hub_name(name)
    if not found:
        raise ValueError(f"{flag} {name}: no such folder; give an existing folder or org/name[@revision]")
    try:
        return Path(snapshot_download(found[0], revision=found[1], **patterns))
    except Exception as error:  # the client raises a dozen kinds; the user needs one line
        raise ValueError(
            f"{flag} {name}: neither a folder here nor to be had from the Hub ({reason(error)}); "
            "check the name and the login"
        ) from None


def _refuse_code(path: Path, name: str) -> None:
    # Files from the Hub must unpickle to plain data. Training loads the files that it wrote itself without this check.
    import codecs

    import numpy as np
    import torch
    from numpy._core.multiarray import _reconstruct

    plain: list[Any] = [
        _reconstruct,
        np.ndarray,
        np.dtype,
        codecs.encode,
        *(type(np.dtype(t)) for t in ("u4", "u8", "i4", "i8", "f4", "f8")),
    ]
    try:
        with torch.serialization.safe_globals(plain):
            torch.load(path, weights_only=True, map_location="meta")
    except Exception as error:
        raise ValueError(
            f"--resume {name}: {path.name} holds more than plain data ({one_line(error)[:200]}); "
            "it could run code, so it is refused: resume from a folder of your own"
        ) from None
