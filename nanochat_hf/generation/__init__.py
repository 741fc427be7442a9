"""Batched generation with a key/value cache and tool calls."""

from .chat import Chat, show
from .engine import Engine
from .sampling import check_sampling, draw_uniforms, sample
from .tools import Completion, Row, answer_parts, special_ids

_Row = Row  # the name tests of the first version import

__all__ = [
    "Chat",
    "Completion",
    "Engine",
    "Row",
    "answer_parts",
    "check_sampling",
    "draw_uniforms",
    "sample",
    "show",
    "special_ids",
]
