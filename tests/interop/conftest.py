"""An encoding of the original nanochat."""

from tests.support.nanochat_checkpoints import encoding  # noqa: F401
