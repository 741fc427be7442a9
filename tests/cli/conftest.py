"""A Hub on loopback, and a finished run."""

from tests.support.hub import finished, hub  # noqa: F401
