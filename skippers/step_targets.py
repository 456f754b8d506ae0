"""Policies that find their threshold while they run, and hold a target through drift.

A glimpse is ranked among the last ones, and the large model writes the steps that rank at or
above a level. The level is what is learned: no number of nats means the same for two pairs of
models, or for two kinds of text. The state is shared by all answers and belongs to one thread.
"""

import math
import random
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Final

from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.step_numbers import (
    MAX_NUMBER,
    broken,
    check_keys,
    check_spec,
    number,
    numbers,
)
from edgeroute.skippers.step_runs import GlanceRun, number_text, seen
from edgeroute.skippers.steps import Glance, StepPart, StepRun, Who

N_RANKED: Final = 256
"""Last glimpses among which a new one is ranked."""
FIRST_NATS: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
"""Entropies that stand for glimpses before there were any."""
RATE: Final = 0.02
"""How far the level moves for one step of mean length that was not as wished."""
LEVELS: Final = -0.5, 1.5
"""A level below 0 gives every step to the large model, one above 1 none; it goes no farther, so
that a target out of reach is soon left when it comes into reach."""
FIRST_LENGTH: Final = 16.0
"""Tokens of a step, before any was seen."""
LENGTH_RATE: Final = 0.05
FIRST_PACE_LEVEL: Final = 0.7
MOST_LATE: Final = 4.0
"""Steps of mean length by which one part can move the level of `pace` at most."""
SHARES: Final = (0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
"""Shares of the steps between which `accuracy` chooses, cheapest first."""
MEMORY: Final = 400.0
"""Rewards after which one counts 1/e."""
MAX_PENDING: Final = 1024
"""Answers that wait for a reward; the oldest goes unjudged beyond."""


class Ranks:
    """The last glimpses, and where a new one stands among them."""

    def __init__(self, entropies: Sequence[float] = FIRST_NATS) -> None:
        self._last = deque(entropies)
        self._sorted = sorted(self._last)

    def rank(self, entropy: float) -> float:
        """Return the share of the last glimpses below, those equal counted half."""
        below, upto = bisect_left(self._sorted, entropy), bisect_right(self._sorted, entropy)
        return (below + upto) / 2 / len(self._sorted)

    def enter(self, entropy: float) -> None:
        """Count a glimpse among the last ones."""
        if len(self._last) >= N_RANKED:
            del self._sorted[bisect_left(self._sorted, self._last.popleft())]
        self._last.append(entropy)
        insort(self._sorted, entropy)

    def to_list(self) -> list[float]:
        """Return the last glimpses, oldest first."""
        return list(self._last)


class _Level(ABC):
    """A level that parts of answers move: up where less of the large model is wanted."""

    def __init__(self, level: float) -> None:
        low, high = LEVELS
        self.level = level if 0 < level < 1 else (low if level <= 0 else high)
        self.length = FIRST_LENGTH
        self.ranks = Ranks()

    @property
    @abstractmethod
    def spec(self) -> str:
        """The policy's text."""

    @abstractmethod
    def error(self, part: StepPart) -> float:
        """Return by how much the level should rise, in steps of mean length."""

    def begin(self, seed: int) -> StepRun:
        """Return the decisions for one answer, which the answers before it had a part in."""
        return _LevelRun(self)

    def choose(self, glance: Glance | None) -> Who:
        """Name the writer of a step of any answer."""
        entropy = seen(glance).entropy
        rank = self.ranks.rank(entropy)
        self.ranks.enter(entropy)
        return "large" if rank >= self.level else "small"

    def note(self, part: StepPart) -> None:
        """Learn from a part of any answer."""
        if part.reason is None and part.n_tokens:  # where a model failed, nothing is learned
            low, high = LEVELS
            self.level = min(high, max(low, self.level + RATE * self.error(part)))
            self.length += LENGTH_RATE * (part.n_tokens - self.length)

    def to_dict(self) -> dict[str, object]:
        """Return what was learned as plain JSON types."""
        return {"spec": self.spec, "level": self.level, "length": self.length,
                "entropies": self.ranks.to_list()}  # fmt: skip

    def restore(self, given: Mapping[str, object]) -> None:
        """Go on from what `to_dict` returned, which nobody vouches for.

        Raises:
            UsageError: it is of another policy, or a number is out of bounds; nothing changed.
        """
        check_keys(given, {"spec", "level", "length", "entropies"})
        check_spec(given, self.spec)
        level = number(given["level"], "level", *LEVELS)
        length = number(given["length"], "length", 1.0, MAX_NUMBER)
        self.ranks = _read_ranks(given["entropies"])
        self.level, self.length = level, length


class _LevelRun(GlanceRun):
    """An answer of a policy that learns a level."""

    def __init__(self, policy: _Level) -> None:
        super().__init__()
        self._policy = policy

    def choose(self, glance: Glance | None) -> Who:
        return self._policy.choose(glance)

    def note(self, part: StepPart) -> None:
        self._policy.note(part)


class TargetShare(_Level):
    """Holds a share of the tokens that the large model writes.

    Every part moves the level by its tokens times the share it is off, so that what the
    answers are behind or ahead in total is the level's own distance from where it began: the
    share holds for any order of glimpses, whatever they depend on.
    Source: Gibbs and Candes 2021, arXiv 2106.00170 (the same rule for coverage).

    Args:
        share: of the tokens, from 0 to 1.
    """

    def __init__(self, share: float) -> None:
        super().__init__(1.0 - share)
        self.share = share

    @property
    def spec(self) -> str:
        """The policy's text."""
        return f"target:{number_text(self.share)}"

    def error(self, part: StepPart) -> float:
        """Return the tokens beyond the share, in steps of mean length."""
        return ((part.model == "large") - self.share) * part.n_tokens / self.length


class TargetPace(_Level):
    """Spends a time per token: the large model writes as much as that allows.

    It takes for granted that the large model makes an answer slower. Where a switch costs more
    than it saves, the level ends at one of its bounds.

    Args:
        token_s: seconds per token of an answer.
    """

    def __init__(self, token_s: float) -> None:
        super().__init__(FIRST_PACE_LEVEL)
        self.token_s = token_s

    @property
    def spec(self) -> str:
        """The policy's text."""
        return f"pace:{number_text(self.token_s)}"

    def error(self, part: StepPart) -> float:
        """Return the time beyond what the part's tokens are allowed, in steps of mean length."""
        late = (part.seconds - self.token_s * part.n_tokens) / (self.token_s * self.length)
        return min(MOST_LATE, max(-MOST_LATE, late)) if math.isfinite(late) else 0.0


class TargetAccuracy:
    """Holds a mean reward with the smallest share of large steps that reaches it.

    A bandit whose arms are shares. For each answer it draws what each arm may be worth from
    what it knows (Thompson sampling) and takes the cheapest arm whose draw reaches the target,
    or the best draw where none does. Rewards are forgotten exponentially, so that arms left
    long ago are tried again. Source: Thompson 1933; discounts as in arXiv 1707.09727.

    Args:
        target: mean reward to hold, from 0 to 1.
    """

    def __init__(self, target: float) -> None:
        self.target = target
        self.ranks = Ranks()
        self._good = [0.0] * len(SHARES)
        self._bad = [0.0] * len(SHARES)
        self._pending: OrderedDict[int, int] = OrderedDict()
        self._n_begun = 0

    @property
    def spec(self) -> str:
        """The policy's text."""
        return f"accuracy:{number_text(self.target)}"

    @property
    def n_pending(self) -> int:
        """Answers that wait for a reward."""
        return len(self._pending)

    def begin(self, seed: int) -> StepRun:
        """Return the decisions for one answer; `feedback` finds it by its seed."""
        self._n_begun += 1
        rng = random.Random(f"{seed}/{self._n_begun}")  # equal seeds must not draw alike forever
        draws = [rng.betavariate(1 + good, 1 + bad)
                 for good, bad in zip(self._good, self._bad, strict=True)]  # fmt: skip
        enough = [arm for arm, draw in enumerate(draws) if draw >= self.target]
        arm = enough[0] if enough else draws.index(max(draws))
        self._pending.pop(seed, None)
        self._pending[seed] = arm
        if len(self._pending) > MAX_PENDING:
            self._pending.popitem(last=False)
        return _AccuracyRun(self.ranks, SHARES[arm])

    def feedback(self, seed: int, reward: float) -> bool:
        """Learn how good an answer was.

        Args:
            seed: that it was begun with; of several, the last one.
            reward: from 0 to 1.

        Returns:
            Whether the answer was known: each is judged once, and only the last ones are kept.

        Raises:
            UsageError: the reward is out of bounds; nothing was learned.
        """
        if not 0 <= reward <= 1:  # also NaN
            raise UsageError(f"a reward must be a number from 0 to 1, got {reward!r}")
        arm = self._pending.pop(seed, None)
        if arm is None:
            return False
        keep = math.exp(-1.0 / MEMORY)
        self._good = [keep * each for each in self._good]
        self._bad = [keep * each for each in self._bad]
        self._good[arm] += reward
        self._bad[arm] += 1.0 - reward
        return True

    def to_dict(self) -> dict[str, object]:
        """Return what was learned as plain JSON types; answers that wait are left out."""
        return {"spec": self.spec, "good": list(self._good), "bad": list(self._bad),
                "entropies": self.ranks.to_list()}  # fmt: skip

    def restore(self, given: Mapping[str, object]) -> None:
        """Go on from what `to_dict` returned, which nobody vouches for.

        Raises:
            UsageError: it is of another policy, or a number is out of bounds; nothing changed.
        """
        check_keys(given, {"spec", "good", "bad", "entropies"})
        check_spec(given, self.spec)
        good, bad = (numbers(given[key], key, len(SHARES), 0.0, MAX_NUMBER)
                     for key in ("good", "bad"))  # fmt: skip
        self.ranks = _read_ranks(given["entropies"])
        self._good, self._bad = good, bad


class _AccuracyRun(GlanceRun):
    """An answer of which a share of the steps, those that rank highest, is the large model's."""

    def __init__(self, ranks: Ranks, share: float) -> None:
        super().__init__()
        self._ranks = ranks
        self._level = 1.0 - share if share else math.inf

    def choose(self, glance: Glance | None) -> Who:
        entropy = seen(glance).entropy
        rank = self._ranks.rank(entropy)
        self._ranks.enter(entropy)
        return "large" if rank >= self._level else "small"


Learning = TargetShare | TargetPace | TargetAccuracy
"""Policies that learn while they run, and can be told what they learned before."""
LEARNING: Final = (TargetShare, TargetPace, TargetAccuracy)


def _read_ranks(value: object) -> Ranks:
    if not isinstance(value, list) or not 1 <= len(value) <= N_RANKED:
        raise broken(f"needs 1 to {N_RANKED} entropies")
    return Ranks(numbers(value, "entropies", len(value), 0.0, MAX_NUMBER))
