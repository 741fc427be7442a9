"""A row of a source → a conversation that can be rendered, its weights, and the parts of the row that were not used."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nanochat_hf.files.data_file import Raw
from nanochat_hf.messages import ConversationError, validate
from nanochat_hf.tasks import get_task

from .columns import renamed
from .formats import convert_row, ignored, row_format
from .loading import load_source
from .sources import SourceConfig
from .weights import Segments, turn_weights


@dataclass(frozen=True)
class Converted:
    """A valid conversation, the factors of its assistant's turns (None: all 1), and names of what was ignored."""

    conversation: dict[str, Any]
    weights: Segments | None = None
    ignored: tuple[str, ...] = ()


def convert(raw: Raw, source: SourceConfig) -> Converted:
    """A raw row of `source` → Converted.

    The message of an error begins with the row's place. It is a ConversationError, or for a line that is no JSON a
    ValueError.
    """
    row, where = raw.parsed(), str(raw.place)
    try:
        conversation, unused = _conversation(row, source, where)
        validate(conversation, where)
        return Converted(conversation, turn_weights(conversation, where), unused)
    except (TypeError, AttributeError, KeyError) as error:  # a value of a type that no form allows
        raise ConversationError(f"{where}: no conversation ({error}); correct or remove the row") from None


def _conversation(row: Any, source: SourceConfig, where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    if source.task:
        try:
            return get_task(source.task).to_conversation(row), ()
        except ValueError as error:
            raise ConversationError(f"{where}: {error}") from None
    row = renamed(row, source.columns, where)
    form = source.converter or row_format(row, where)
    return convert_row(row, where, form), tuple(ignored(row, form))


def conversations(source: SourceConfig) -> Iterator[Converted]:
    """The conversations of a source, in order; errors name the file and the row."""
    rows = load_source(source)
    for number in range(len(rows)):
        yield convert(rows.raw(number), source)
