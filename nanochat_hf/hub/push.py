"""To the Hub and back: log in, stage, push in the background, fetch models and checkpoints by name."""

import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, RemoteEntryNotFoundError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from tqdm import tqdm

from .card import hub_name
from .folder import LAST, lay_out, run_settings, scrub, write_card

STRATEGIES = ("end", "every_save", "checkpoint")
NO_MODEL = [f"{LAST}/*", "checkpoint-*", "*.pt", "*.bin", "*.png", "metrics.jsonl"]


@dataclass(frozen=True)
class HubConfig:
    """Whether, where and when to push. The token comes from `hf auth login` or HF_TOKEN and is no part of any configuration."""

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
            "help": "end: the final model; every_save: the model at each checkpoint; checkpoint: also the state to resume from"
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
                f"--hub-model-id {self.hub_model_id} without --push-to-hub pushes nothing; add --push-to-hub or leave it out"
            )
        if self.hub_model_id:
            check_repo_id(self.hub_model_id)


def check_repo_id(repo_id, flag="--hub-model-id"):
    """ValueError where the Hub would not take `repo_id` ("org/name" or "name") as a name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{flag} {repo_id}: no name for a repository ({_line(error)}); give org/name") from None


def connect(repo_id, *, private=False, revision=None, repo_type="model", wait=2.0):
    """Log in and make the repository and branch where they are new; returns (HfApi, "org/name"). ValueError says what is missing."""
    api = HfApi()
    try:
        user = retried(api.whoami, wait=wait)["name"]
        full = repo_id if "/" in repo_id else f"{user}/{repo_id}"
        retried(lambda: api.create_repo(full, private=private or None, repo_type=repo_type, exist_ok=True), wait=wait)
        if revision not in (None, "main"):
            retried(lambda: api.create_branch(full, branch=revision, repo_type=repo_type, exist_ok=True), wait=wait)
    except LocalTokenNotFoundError:
        raise ValueError(f"push to {repo_id}: not logged in to the Hub; run `hf auth login` or set HF_TOKEN") from None
    except Exception as error:
        remedy = {
            401: "the token is invalid or has expired; run `hf auth login` or set a fresh HF_TOKEN",
            403: "the token may not write there; use a token with write access, or another --hub-model-id",
        }.get(
            _status(error),
            "check the network and HF_ENDPOINT, or train without --push-to-hub and push later with scripts.push_to_hub",
        )
        raise ValueError(f"push to {repo_id}: {reason(error)}; {remedy}") from None
    return api, full


def retried(action, *, attempts=3, wait=5.0):
    """action(), again after `wait`, 2·`wait` … seconds where the fault may pass; faults of the request itself (4xx) raise at once."""
    for attempt in range(attempts):
        try:
            return action()
        except Exception as error:
            status = _status(error)
            passing = status is None or status >= 500 or status in (408, 409, 412, 429)
            if isinstance(error, LocalTokenNotFoundError | HFValidationError) or not passing or attempt + 1 == attempts:
                raise
            time.sleep(wait * 2**attempt)


def _status(error):
    """HTTP status of an error or of what caused it; None where no answer came."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return error.response.status_code
        error = error.__cause__ or error.__context__
    return None


def reason(error):
    """One line about an error and its cause, without the token and without the signed part of a URL."""
    cause = error.__cause__ or error.__context__
    text = _line(error) if cause is None or _line(cause) in _line(error) else f"{_line(error)} {_line(cause)}"
    return scrub(re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", text))[:400]


def _line(error):
    return " ".join(str(error).split()) or type(error).__name__


class HubPusher:
    """Pushes model folders to one repository, one after another, in a thread of huggingface_hub's own.

    A failed push is retried, then told in one line; nothing is raised. While one push runs, the newest of those that wait takes
    the place of the others. Use it in one process only (`finish` before it ends).
    """

    def __init__(self, repo_id, *, private=False, strategy="end", revision=None, attempts=3, wait=5.0, say=tqdm.write):
        self.strategy, self.revision, self.attempts, self.wait, self.say = strategy, revision, attempts, wait, say
        self.api, self.repo_id = connect(repo_id, private=private, revision=revision, wait=wait)
        self.jobs, self.failure, self.scratch = [], None, None

    @classmethod
    def from_config(cls, config, *, idle=False):
        """The pusher that a HubConfig asks for, logged in, or None; ValueError before any long work.

        Ranks other than 0 get None, and so does a run that is `idle`: it writes no model.
        """
        # RANK is set by every launcher of several processes on this side of XLA; there a second login does no harm
        if idle or not config.push_to_hub or os.environ.get("RANK", "0") != "0":
            return None
        disable_progress_bars()  # the uploads' bars would tear the training's own apart
        return cls(
            config.hub_model_id, private=config.hub_private, strategy=config.hub_strategy, revision=config.hub_revision
        )

    def submit(
        self, folder, *, run_dir=None, checkpoint=None, results=None, license=None, language=None, message="Push model"
    ):
        """Push the model in `folder`, in the background; `run_dir` holds config.json and metrics.jsonl of the run."""
        try:
            stage = lay_out(folder, self._scratch(run_dir) / uuid4().hex, run_dir or folder, checkpoint)
            settings = run_settings(run_dir or folder)
            while self.jobs and self.jobs[-1][0].cancel():
                shutil.rmtree(self.jobs.pop()[1], ignore_errors=True)
            card = {"settings": settings, "results": results, "license": license, "language": language}
            future = self.api.run_as_future(self._push, stage, card, message, str(folder))
            self.jobs.append((future, stage))
        except Exception as error:  # a full disk must end the push, not the run
            self._failed(message, str(folder), error)

    def _scratch(self, run_dir):
        if self.scratch is None:
            try:
                self.scratch = Path(run_dir) / ".hub-stage"
                shutil.rmtree(self.scratch, ignore_errors=True)  # of a run that was killed
                self.scratch.mkdir()
            except (OSError, TypeError):  # a folder that is not ours to write to, or none
                self.scratch = Path(tempfile.mkdtemp(prefix="hub-stage-"))
        return self.scratch

    def _push(self, stage, card, message, folder):
        try:
            write_card(
                stage,
                self.repo_id,
                revision=self.revision,
                existing=lambda: retried(self._existing_card, wait=self.wait),
                **card,
            )
            commit = retried(lambda: self._upload(stage, message), attempts=self.attempts, wait=self.wait)
            self.failure = None
            self.say(f"pushed to {commit.commit_url} ({message})")
        except Exception as error:
            self._failed(message, folder, error)
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _upload(self, stage, message):
        stale = (
            f"{LAST}/*" if (stage / LAST).is_dir() else None
        )  # files of another number of processes must not stay beside the new
        return self.api.upload_folder(
            repo_id=self.repo_id,
            folder_path=stage,
            commit_message=message,
            revision=self.revision,
            delete_patterns=stale,
        )

    def _existing_card(self):
        try:  # force: an answer from the cache could be older than what a person wrote since
            path = self.api.hf_hub_download(self.repo_id, "README.md", revision=self.revision, force_download=True)
        except RemoteEntryNotFoundError:  # not its sibling for a Hub out of reach
            return None
        return Path(path).read_text(encoding="utf-8")

    def _failed(self, message, folder, error):
        self.failure = reason(error)
        remedy = f"python -m scripts.push_to_hub {folder} --hub-model-id {self.repo_id}"
        self.say(
            f"push to {self.repo_id} failed ({message}): {self.failure}; {folder} is whole, push it later with: {remedy}"
        )

    def finish(self):
        """Wait for what is under way; returns whether the last push arrived."""
        for future, _ in self.jobs:
            try:
                future.result()
            except CancelledError:
                continue
            except KeyboardInterrupt:  # an ordinary exit would wait for the client's thread, however long it hangs
                self.say(
                    f"push to {self.repo_id} interrupted; what was to go there is whole, push it later with scripts.push_to_hub"
                )
                sys.stdout.flush()
                os._exit(130)
        self.jobs.clear()
        if self.scratch:
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch = None
        return self.failure is None


def fetch_model(name):
    """A model folder for `name`: an existing folder as it is; "org/name[@revision]" downloaded (or from the cache), without pickles.

    ValueError where it is neither.
    """
    if Path(str(name)).is_dir():
        return str(name)
    folder = _fetch(name, "--model", ignore_patterns=NO_MODEL)
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {name}: that repository has no config.json, so no model; give another name")
    return str(folder)


def fetch_checkpoint(name):
    """A checkpoint for --resume: None, "auto" and folders as they are; "org/name[@revision]" → its last-checkpoint/, downloaded.

    ValueError where there is none, or where loading it would run code from the Hub.
    """
    if name in (None, "auto") or Path(str(name)).is_dir() or not hub_name(name):
        return name
    folder = _fetch(name, "--resume", allow_patterns=[f"{LAST}/*"]) / LAST
    if not (folder / "trainer.json").is_file():
        raise ValueError(f"--resume {name}: that repository has no {LAST}/; push with --hub-strategy checkpoint")
    for path in sorted(folder.glob("*.pt")):
        _refuse_code(path, name)
    return str(folder)


def _fetch(name, flag, **patterns):
    found = hub_name(name)
    if not found:
        raise ValueError(f"{flag} {name}: no such folder; give an existing folder or org/name[@revision]")
    try:
        return Path(snapshot_download(found[0], revision=found[1], **patterns))
    except Exception as error:  # the client has a dozen kinds; the user needs the reason in one line
        raise ValueError(
            f"{flag} {name}: neither a folder here nor to be had from the Hub ({reason(error)}); check the name and the login"
        ) from None


def _refuse_code(path, name):
    """ValueError unless `path` unpickles to plain data: training loads its own files without that check, strangers' files must pass it."""
    import codecs

    import numpy as np
    import torch

    plain = [
        np._core.multiarray._reconstruct,
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
            f"--resume {name}: {path.name} holds more than plain data ({_line(error)[:200]}); it could run code, refused"
        ) from None
