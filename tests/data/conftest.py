"""A tiny model with its conversations."""

from tests.support.training import start  # noqa: F401
