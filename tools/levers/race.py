"""Who of many is quicker than one, surely: a race that ends for each as soon as that is known.

Every configuration is compared with the default by ratios of turns, see `turns`; here is what
those ratios say. Turns are noisy in ways that means do not survive: on shared disks single turns
take twice as long as their neighbours, and everything drifts. So:

- What counts is the logarithm of the default's seconds over the configuration's, both of one
  round and of the same text. A drift that outlasts a round is in both and cancels.
- Noise that befalls both alike makes such a difference symmetric about the true ratio, whatever
  its distribution. That is all that Wilcoxon's signed-rank test asks for: its probabilities are
  exact for a handful of rounds, and a turn of twice the time counts as one rank, no more.
- A configuration leaves once the default is surely within the margin of it (those that are
  slower are such), or surely beyond. Only those that are open go on, so that the rounds become
  shorter and the time goes where it decides something. That is successive halving (Jamieson and
  Talwalkar 2016) with the halves cut by a test.
- It is tested at the rounds LOOKS only, each time at one level (a constant boundary, Pocock
  1977), so low that one that lies right at the margin leaves by a wrong exit in 2 to 4 % of races
  a side. That was found by simulation: tests/tools/test_levers_race.py plays races with tails of
  a factor of 2, drift, and processes that are a little quicker or slower all their life. Under
  that noise 48 rounds clear 9 of 10 that are 10 % slower, and 2 of 10 that are level.

The best of many noisy figures is too good, so that no figure of a race is a verdict: the best is
measured again, with runs that took no part in choosing it.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Final, Literal

from edgeroute.tools.levers.gain import centre

Standing = Literal["open", "within", "beyond"]
"""Not known yet; the default is surely within the margin of it; it is surely quicker by more."""

LIFE: Final = 6
"""Rounds that one process serves: see `turns`."""
LOOKS: Final = (12, 18, 24, 36, 48, 72, 96, 132)
"""Rounds after which it is tested who may leave; multiples of LIFE."""
LEVEL: Final = 0.004
"""Chance of a wrong exit at one look, one side."""


class Race:
    """Ratios by configuration, and who is still open.

    Args:
        names: of the configurations.
        margin: ratio less 1 by which one must be quicker to matter.
    """

    def __init__(self, names: Iterable[str], margin: float) -> None:
        self.logs: dict[str, list[float]] = {name: [] for name in names}
        self.standings: dict[str, Standing] = dict.fromkeys(self.logs, "open")
        self._margin = math.log1p(margin)

    def add(self, name: str, default_s: float, single_s: float) -> None:
        """Enter what one round says of a configuration, and decide on it at the looks."""
        logs = self.logs[name]
        logs.append(math.log(default_s / single_s))
        if self.standings[name] == "open" and len(logs) in LOOKS:
            self.standings[name] = standing(logs, self._margin)

    def rounds(self, name: str) -> int:
        """Return how many rounds a configuration has run."""
        return len(self.logs[name])

    def centre(self, name: str) -> float:
        """Return the middle of a configuration's logarithms."""
        return centre(self.logs[name])

    def drop(self, name: str) -> None:
        """Take out one that cannot be run."""
        del self.logs[name], self.standings[name]

    @property
    def open(self) -> list[str]:
        """Those that go on."""
        over = LOOKS[-1]
        return [name for name, logs in self.logs.items()
                if self.standings[name] == "open" and len(logs) < over]  # fmt: skip

    @property
    def best(self) -> str | None:
        """The quickest by its centre: of those surely beyond, else of the open, else of all."""
        measured = [name for name, logs in self.logs.items() if logs]
        for wanted in ("beyond", "open", "within"):
            among = [name for name in measured if self.standings[name] == wanted]
            if among:
                return max(among, key=self.centre)
        return None


def standing(logs: Sequence[float], margin: float) -> Standing:
    """Tell where the middle of logarithms surely lies."""
    if below_chance([log - margin for log in logs]) <= LEVEL:
        return "within"
    if below_chance([margin - log for log in logs]) <= LEVEL:
        return "beyond"
    return "open"


def below_chance(values: Sequence[float]) -> float:
    """Return how likely values so low are if their middle is not below 0: exact, signed ranks.

    Of equal sizes those above 0 get the higher ranks, which errs on the side of not knowing.

    Source: Wilcoxon 1945; the distribution by counting subsets of ranks.
    """
    ranked = sorted(values, key=lambda value: (abs(value), value >= 0))
    above = sum(rank for rank, value in enumerate(ranked, 1) if value >= 0)
    return _cumulated(len(ranked))[above]


@functools.cache
def _cumulated(n: int) -> tuple[float, ...]:
    """Return the chance that ranks 1 to n, each counted or not by a coin, sum up to at most i."""
    chances = [1.0]
    for rank in range(1, n + 1):
        longer = chances + [0.0] * rank
        moved = [0.0] * rank + chances
        chances = [(a + b) / 2 for a, b in zip(longer, moved, strict=True)]
    total, found = 0.0, []
    for chance in chances:
        total += chance
        found.append(total)
    return tuple(found)
