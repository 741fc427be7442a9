"""A Hub on loopback."""

from tests.support.hub import hub  # noqa: F401
