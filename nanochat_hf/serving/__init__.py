"""An OpenAI-compatible server of one model, on continuous batching, and a page that uses it.

A request's way: `app.py` takes its bytes, `fields.py` reads values out of them, `chat.py` or `completions.py` makes
the engine's requests, `scheduler.py` runs them on its thread, `writing.py` makes text and calls of the tokens, and
`answers.py` sends them back as JSON, whole or as a stream. `errors.py` has the errors.
"""

from .errors import ApiError
from .scheduler import Scheduler
from .served import Served

__all__ = ["ApiError", "Scheduler", "Served"]
