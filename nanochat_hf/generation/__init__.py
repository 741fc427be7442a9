"""Batched generation with a key/value cache and tool calls."""

from .chat import Chat, show
from .continuous import Continuous
from .engine import Engine
from .requests import Event, Request
from .sampling import check_sampling, draw_uniforms, sample
from .tools import Completion, Row, answer_parts, special_ids

_Row = Row  # the name tests of the first version import

__all__ = [
    "Chat",
    "Completion",
    "Continuous",
    "Engine",
    "Event",
    "Request",
    "Row",
    "answer_parts",
    "check_sampling",
    "draw_uniforms",
    "sample",
    "show",
    "special_ids",
]
