"""Which of a token's chosen experts it does without because they are not in memory.

Three rules, all off unless asked for, all for one token at a time. They look at residency, which
is history: equal prompts may get other answers. None touches the expert that weighs most.

    swap    experts rated within a margin of the last chosen one are near ties: of those, ones in
            memory are taken before ones that would have to be read.
            Source: cache-aware routing (arXiv 2412.00099), with ties instead of a bonus.
    drop    a missing expert is left out where those that weigh more have all but a share of the
            chosen ones' weight already, so that a layer loses that share at most.
            Source: HOBBIT (arXiv 2411.01433), its cumulative rule: T2 is 1 less the share.
    degrade by the same rule with a larger share, a missing expert that is not left out is computed
            from a copy of fewer bits. Source: HOBBIT, whose T1 is 1 less this share.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Weights = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int32]
Marks = npt.NDArray[np.bool_]


def dropped(weights: Weights, here: Marks, share: float) -> Marks:
    """Mark the chosen experts that a token does without: bool (n_tokens, k).

    Args:
        weights: of the chosen experts, F32 (n_tokens, k), in any order, none negative.
        here: bool (n_tokens, k), which are in memory or on their way.
        share: of a token's weight that may be lost, 0 to 1; 0 drops nothing.
    """
    if share <= 0:
        return np.zeros(weights.shape, np.bool_)
    order = np.argsort(-weights, axis=1, kind="stable")
    falling = np.take_along_axis(weights, order, axis=1).astype(np.float64)
    sums = np.cumsum(falling, axis=1)
    before = np.zeros_like(sums)
    before[:, 1:] = sums[:, :-1]
    over = before > (1.0 - share) * sums[:, -1:]
    over[:, 0] = False  # also of weights that are all 0
    found = np.zeros(weights.shape, np.bool_)
    np.put_along_axis(found, order, over, axis=1)
    return found & ~here


def swapped(numbers: Numbers, nats: Weights, here: Marks, margin: float) -> Numbers:
    """Choose again among near ties, those in memory first: I32 (n_tokens, k), best rated first.

    The first one stays. Rows in which nothing changes are the given ones.

    Args:
        numbers: of the chosen experts, I32 (n_tokens, k), best rated first.
        nats: logarithm of what all experts are rated, F32 (n_tokens, n_expert).
        here: bool (n_expert,), which are in memory or on their way.
        margin: from the last chosen one, nats, that makes a near tie; 0 changes nothing.
    """
    if margin <= 0 or numbers.shape[1] < 2:
        return numbers
    found = numbers.copy()
    for row, rated in zip(found, nats, strict=True):
        last = rated[row[-1]]
        away = [
            i for i in range(1, len(row)) if not here[row[i]] and rated[row[i]] <= last + margin
        ]
        if not away:
            continue
        ties = here & (rated >= last - margin)
        ties[row] = False
        others = np.flatnonzero(ties)
        best = others[np.argsort(-rated[others], kind="stable")]
        places = away[::-1][: len(best)]  # the worst rated give way first
        if not places:
            continue
        row[places] = best[: len(places)]
        row[1:] = row[1:][np.argsort(-rated[row[1:]], kind="stable")]
    return found


@dataclass(slots=True, kw_only=True)
class MissLevers:
    """The rules of one model, and what they did. The engine thread owns it.

    Attributes:
        drop_misses: share of a token's weight in a layer that missing experts may take with them.
        prefer_resident: margin of near ties, nats.
        degrade_misses: share of a token's weight that copies of missing experts may stand for.
        dropped, replaced, degraded: experts of a token and layer, counted each time.
        saved: experts that were not read for it, by layer; one that several tokens of a pass did
            without counts once, and not at all where another token had it read.
    """

    drop_misses: float = 0.0
    prefer_resident: float = 0.0
    degrade_misses: float = 0.0
    dropped: int = 0
    replaced: int = 0
    degraded: int = 0
    saved: Counter[int] = field(default_factory=Counter)

    @property
    def reads_scores(self) -> bool:
        """Whether it wants to know how all experts are rated."""
        return self.prefer_resident > 0

    def swap(self, numbers: Numbers, nats: Weights, here: Marks) -> Numbers:
        """Choose again among near ties: see `swapped`."""
        return swapped(numbers, nats, here, self.prefer_resident)

    def drop(self, weights: Weights, here: Marks) -> Marks:
        """Mark what is done without: see `dropped`."""
        return dropped(weights, here, self.drop_misses)

    def degrade(self, weights: Weights, here: Marks) -> Marks:
        """Mark what a copy will do for: see `dropped`, whose rule it is."""
        return dropped(weights, here, self.degrade_misses)

    def count(
        self, il: int, *, replaced: int = 0, dropped: int = 0, saved: int = 0, degraded: int = 0
    ) -> None:
        """Enter what became of a layer's choice."""
        self.degraded += degraded
        self.replaced += replaced
        self.dropped += dropped
        self.saved[il] += saved
