"""A tiny model with its conversations, and whole runs on them."""

from tests.support.training import start, whole  # noqa: F401
