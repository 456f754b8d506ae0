"""Random step routing at a share of tokens: the baseline that every other policy must beat."""

import random
from collections import OrderedDict
from typing import Final

from edgeroute.skippers.step_runs import PlainRun, number_text
from edgeroute.skippers.steps import WHO, Glance, StepPart, StepRun, Who

STEADY: Final = 16
"""Steps over which `random` makes good what it is behind or ahead: so few that the share is met
within an answer, so many that a step's writer is hardly ever certain."""
EQUAL_STEPS: Final = 8.0
"""Steps of each model that `random` takes to be equally long before it saw any."""
MAX_SEEDS: Final = 4096
"""Answers whose seeds `random` knows again."""


class Random:
    """Steps fall to the large model by chance, so that it writes a share of the tokens.

    A step's chance is not the share itself. Where one model writes longer steps, as all answers
    so far tell, the chance is corrected for that; and by a sixteenth of what the answer is
    behind or ahead, counted in steps of its mean length. Both corrections are 0 on average
    where steps are equally long. What is known of lengths when a seed first begins an answer
    stands for that seed, so that it gives the same decisions again.

    Args:
        share: of the tokens, from 0 to 1.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._n_tokens: dict[Who, int] = {"small": 0, "large": 0}
        self._n_parts: dict[Who, int] = {"small": 0, "large": 0}
        self._first: OrderedDict[int, float] = OrderedDict()

    @property
    def spec(self) -> str:
        """The policy's text."""
        return f"random:{number_text(self.share)}"

    def begin(self, seed: int) -> StepRun:
        """Return the decisions for one answer."""
        even = self._first.setdefault(seed, self._even())
        if len(self._first) > MAX_SEEDS:
            self._first.popitem(last=False)
        return _RandomRun(self, even, seed)

    def note(self, part: StepPart) -> None:
        """Learn from a part of any answer."""
        self._n_tokens[part.model] += part.n_tokens
        self._n_parts[part.model] += 1

    def _even(self) -> float:
        """Return the chance of a step for which the share of tokens is expected."""
        n_parts = sum(self._n_parts.values())
        if not n_parts:
            return self.share
        mean = sum(self._n_tokens.values()) / n_parts
        small, large = (
            (self._n_tokens[who] + EQUAL_STEPS * mean) / (self._n_parts[who] + EQUAL_STEPS)
            for who in WHO
        )
        return self.share * small / (self.share * small + (1 - self.share) * large)


class _RandomRun(PlainRun):
    def __init__(self, policy: Random, even: float, seed: int) -> None:
        super().__init__()
        self._policy = policy
        self._even = even
        self._random = random.Random(seed)
        self._n_tokens = self._n_parts = self._n_large = 0

    def choose(self, glance: Glance | None) -> Who:
        behind = self._policy.share * self._n_tokens - self._n_large
        mean = self._n_tokens / max(1, self._n_parts)
        chance = self._even + (behind / mean / STEADY if mean else 0.0)
        return "large" if self._random.random() < chance else "small"

    def note(self, part: StepPart) -> None:
        if part.n_tokens:
            self._n_tokens += part.n_tokens
            self._n_parts += 1
            self._n_large += part.n_tokens * (part.model == "large")
            self._policy.note(part)
