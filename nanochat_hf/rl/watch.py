"""Signs that a run teaches nothing, named early and with what to change."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from .answers import Group

NEVER_ENDING = 3  # steps in a row without an answer that ends
ALL_EQUAL = 20  # steps in a row without a mixed group
ALL_ERRORS = 3  # steps in a row in which every answer's reward failed
LOW_ENTROPY = 1e-3  # nats a token, from where samples hardly differ any more


@dataclass
class Watch:
    """Counts bad steps in a row; part of the checkpoint. ValueError where there are too many."""

    never_ending: int = 0
    equal: int = 0
    failed: int = 0
    sure: bool = False  # that the entropy is low was said already

    def look(self, groups: Sequence[Group], max_new_tokens: int) -> None:
        """Look at all groups of a step."""
        answers = [answer for group in groups for answer in group.answers]
        self.never_ending = 0 if any(answer.finished for answer in answers) else self.never_ending + 1
        self.failed = 0 if any(not answer.graded.errors for answer in answers) else self.failed + 1
        self.equal = 0 if any(group.mixed for group in groups) else self.equal + 1
        if self.failed == ALL_ERRORS:
            raise ValueError(
                f"every reward of {ALL_ERRORS} steps failed, the last with {answers[-1].graded.errors[0]}; "
                "correct the function of --reward, or raise --reward-seconds"
            )
        if self.never_ending == NEVER_ENDING:
            raise ValueError(
                f"no answer of {NEVER_ENDING} steps ended within {max_new_tokens} tokens, so none can earn anything; "
                "fine-tune the model on conversations first (scripts.chat_sft), or raise --max-new-tokens"
            )
        if self.equal == ALL_EQUAL:
            rewards = [answer.reward for answer in answers if not np.isnan(answer.reward)]
            level = float(np.mean(rewards)) if rewards else np.nan
            raise ValueError(
                f"in {ALL_EQUAL} steps no question had answers of different reward (the last mean was {level:.3g}), so "
                "there is nothing to learn from; give questions that the model gets right now and then, a reward with "
                "more shades, more --num-samples, or a higher --temperature"
            )

    def warning(self, entropy: float | None) -> str | None:
        """What to say, once, where the entropy (nats a token) is near zero."""
        if entropy is None or entropy >= LOW_ENTROPY or self.sure:
            return None
        self.sure = True
        return (
            f"warning: entropy {entropy:.2g} nats a token: samples hardly differ, so there is little to learn from; "
            "raise --temperature, lower --init-lr-frac, or keep rare tokens alive with --clip token --clip-high 0.28"
        )

    def state_dict(self) -> dict[str, int | bool]:
        """The counts."""
        return asdict(self)
