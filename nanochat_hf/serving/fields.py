"""Values out of a request's JSON, each checked; null counts as absent, as in OpenAI's API."""

import math
from collections.abc import Mapping
from typing import Any

from .errors import ApiError, bad

# what a client may send and what changes no answer here
IGNORED = frozenset(
    "metadata prompt_cache_key prompt_cache_retention safety_identifier service_tier store user".split()
)
# what is not computed here, and the values that ask for nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": (),
    "functions": (),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
STOPS = 4  # the most stop sequences of a request, OpenAI's limit


class Fields:
    """The fields of a request; ApiError names what is wrong with one."""

    def __init__(self, body: Any) -> None:
        if not isinstance(body, Mapping):
            raise ApiError(400, "the body must be a JSON object")
        self.given = {key: value for key, value in body.items() if value is not None}

    def know(self, names: frozenset[str]) -> None:
        """Refuse what is not among these names, unless it asks for nothing."""
        for name, value in self.given.items():
            if name in names or name in IGNORED:
                continue
            if name not in NEUTRAL:
                raise bad(name, f"Unrecognized request argument supplied: {name}", "unknown_parameter")
            allowed = NEUTRAL[name]
            if value not in allowed:
                remedy = f"leave it out{f' or give {allowed[0]!r}' if allowed else ''}"
                raise bad(name, f"{name}={value!r:.60} is not supported by this server; {remedy}", "unsupported_value")
        if best := self.given.get("best_of"):
            self.given.setdefault("n", best)

    def number(self, name: str, least: float, most: float, default: float) -> float:
        """A number within bounds."""
        value = self.given.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise bad(name, f"{name}={value!r:.60} must be a number")
        if not least <= value <= most:
            raise bad(name, f"{name}={value} must lie between {least:g} and {most:g}")
        return float(value)

    def whole(self, name: str, least: int, most: int | None, default: int | None) -> int | None:
        """A whole number within bounds; `default` where it is absent."""
        value = self.given.get(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise bad(name, f"{name}={value!r:.60} must be a whole number")
        if value < least or (most is not None and value > most):
            raise bad(name, f"{name}={value} must be at least {least}{f' and at most {most}' if most else ''}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.given.get(name, default)
        if not isinstance(value, bool):
            raise bad(name, f"{name}={value!r:.60} must be true or false")
        return value

    def text(self, name: str) -> str | None:
        """A string, None where it is absent."""
        value = self.given.get(name)
        if value is not None and not isinstance(value, str):
            raise bad(name, f"{name}={value!r:.60} must be a string")
        return value

    def stops(self) -> tuple[str, ...]:
        """The strings at which an answer ends."""
        value = self.given.get("stop", [])
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
            raise bad("stop", f"stop={value!r:.60} must be a non-empty string, or a list of them")
        if len(stops) > STOPS:
            raise bad("stop", f"stop has {len(stops)} strings; at most {STOPS} are allowed")
        return tuple(stops)

    def usage_wanted(self, stream: bool) -> bool:
        """Whether a stream ends with the count of tokens."""
        options = self.given.get("stream_options")
        if options is None:
            return False
        if not stream:
            raise bad("stream_options", "stream_options is only allowed with stream=true")
        if not isinstance(options, Mapping) or not isinstance(options.get("include_usage", False), bool):
            raise bad("stream_options", f'stream_options={options!r:.60} must be {{"include_usage": true or false}}')
        return options.get("include_usage", False)
