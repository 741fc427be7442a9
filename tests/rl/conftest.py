"""A tiny chat model with its questions, which runs of chat_rl start from."""

from tests.support.reinforcing import rl_start  # noqa: F401
