"""What continuous batching is asked for and what it tells: requests, events, and the samples that run."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from .row_cache import Prefix
from .row_table import Draw
from .sampling import check_sampling
from .static import STEPS
from .tools import Completion, Row

IDLE = [0, 0, 0, 0, 1, 0, *[-1] * STEPS]  # the state of a row that is not in use


@dataclass(frozen=True)
class Request:
    """One prompt and how to go on from it; ValueError for what cannot be.

    Sample j depends on `seed` and j alone, whatever else runs, up to the rounding of the kernels. It is
    sample j of `Engine.generate([prompt], seed=[seed])`. `log_probs` and `top` (so many of the likeliest tokens) ask
    for the fields of that name in `Completion`. Without `calculate` calls of the calculator stay without an answer.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | str = 0
    num_samples: int = 1
    log_probs: bool = False
    top: int = 0
    calculate: bool = True

    def __post_init__(self) -> None:
        check_sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            num_samples=self.num_samples,
        )
        if not len(self.prompt):
            raise ValueError("a prompt must be a non-empty list of ids; render_prompt gives one")
        if self.top < 0:
            raise ValueError(f"top={self.top} must be a number of tokens, at least 0")

    @property
    def draw(self) -> Draw:
        """How its tokens are chosen."""
        return Draw(self.temperature, self.top_k, self.top_p, self.log_probs or self.top > 0)


@dataclass(frozen=True)
class Event:
    """What one step gave one sample.

    `completion` is the sample so far and grows with later steps: read it before the next one. Its entries from `start`
    are new. Where the sample is `done`, `completion.end` is the id of the end token, or None where it has
    max_new_tokens.
    """

    handle: int
    sample: int
    start: int
    completion: Completion
    done: bool

    @property
    def ids(self) -> list[int]:
        """The new ids, forced ones too."""
        return self.completion.ids[self.start :]


@dataclass
class Job:
    """A request of which not all samples have begun."""

    handle: int
    request: Request
    samples: deque[int]
    prefix: Prefix | None = None  # of all but the prompt's last token, which is the first that a row reads


@dataclass
class Live:
    """A sample in a row."""

    handle: int
    sample: int
    request: Request
    row: Row
    draw: Draw = field(init=False)

    def __post_init__(self) -> None:
        self.draw = self.request.draw
        self.row.last = self.request.prompt[-1]

    @property
    def before(self) -> int:
        """The token before its last one, 0 where there is none."""
        newest = [*self.request.prompt[-2:], *self.row.out.ids[-2:]][-2:]
        return newest[0] if len(newest) == 2 else 0

    @property
    def position(self) -> int:
        """Where its last token stands, which the model reads next."""
        return len(self.request.prompt) - 1 + len(self.row.out.ids)

    def state(self, steps: int) -> list[int]:
        """What `RowTable.load` takes, with the forced tokens of the next `steps`."""
        pending = list(self.row.pending)[:steps]
        count, limit = len(self.row.out.ids), self.request.max_new_tokens
        return [self.row.last, self.position, count, limit, 0, self.before, *pending, *[-1] * (STEPS - len(pending))]
