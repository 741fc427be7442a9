"""Talking to the Hub: log in, create a repository, try again, and say in one line what went wrong."""

import re
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from .folder import scrub

T = TypeVar("T")
ATTEMPTS = 3  # at a request whose fault may pass


def check_repo_id(repo_id: str, flag: str = "--hub-model-id") -> None:
    """Raise ValueError if the Hub would not take `repo_id` ("org/name" or "name") as a name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{flag} {repo_id}: no name for a repository ({one_line(error)}); give org/name") from None


def connect(
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    repo_type: str = "model",
    wait: float = 2.0,
) -> tuple[HfApi, str]:
    """Log in, and create the repository and the branch if they are new; returns the client and "org/name".

    Raises ValueError that says what is missing: a login, the right to write, or the network.
    """
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


def retried(action: Callable[[], T], *, attempts: int = ATTEMPTS, wait: float = 5.0) -> T:
    """Call `action`, and again after `wait`, 2·`wait` … seconds if the fault may pass.

    A fault of the request itself (4xx) raises at once, and the last attempt raises any fault.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return action()
        except Exception as error:
            status = _status(error)
            passing = status is None or status >= 500 or status in (408, 409, 412, 429)
            if isinstance(error, LocalTokenNotFoundError | HFValidationError) or not passing or attempt == attempts:
                raise
            time.sleep(wait * 2 ** (attempt - 1))


def _status(error: BaseException | None) -> int | None:
    # HTTP status of an error or of its cause; None if no answer came
    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return error.response.status_code
        error = error.__cause__ or error.__context__
    return None


def reason(error: BaseException) -> str:
    """One line about an error and its cause, without the token and without the signed part of a URL."""
    cause = error.__cause__ or error.__context__
    text = (
        one_line(error)
        if cause is None or one_line(cause) in one_line(error)
        else f"{one_line(error)} {one_line(cause)}"
    )
    return scrub(re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", text))[:400]


def one_line(error: BaseException) -> str:
    """The message of an error on one line; its kind if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
