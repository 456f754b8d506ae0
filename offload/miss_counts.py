"""What a device misses: really, and what it would have missed had it done otherwise."""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

STEPS_KEPT: Final = 64
"""Steps that averages are over: topics change, and single tokens differ by half."""
ENOUGH: Final = 16
"""Steps of a way after which what it misses is believed."""
SETTLING: Final = {False: 8, True: 16}
"""Steps that do not count for that, by whether they compute: the cache is still as the other way
has left it. Of computing it is better than it will be, since what it holds grows old."""
FORGETTING: Final = 0.99
GUESSED_HITS, GUESSED_HELD = 2, 16
"""Of held pages asked for again, before a step has told: as if so many had been, of so many."""


@dataclass(slots=True)
class Step:
    """One decode step: pages missed, leases that missed any, and what others would have missed.

    `if_uploaded` is what a cache would have missed into which every miss is uploaded,
    `if_frozen` one that has not changed for a while; `computing` which way it went.
    """

    missed: int = 0
    leases: int = 0
    if_uploaded: int = 0
    if_frozen: int = 0
    computing: bool = False


class Ghost:
    """The numbers of pages that one layer's slots would hold, least recently used out first."""

    __slots__ = ("frozen", "lru", "n_slots")

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self.lru: OrderedDict[int, None] = OrderedDict()
        self.frozen: frozenset[int] = frozenset()

    def lease(self, experts: Sequence[int]) -> tuple[int, int]:
        """Enter a lease; return the misses of a cache that uploads, and of a frozen one."""
        lru, missed, missed_frozen = self.lru, 0, 0
        for expert in experts:
            missed_frozen += expert not in self.frozen
            if expert in lru:
                lru.move_to_end(expert)
            else:
                missed += 1
                lru[expert] = None
        while len(lru) > self.n_slots:
            lru.popitem(last=False)
        return missed, missed_frozen


@dataclass(frozen=True, slots=True, kw_only=True)
class Misses:
    """Averages per step: leases that miss, pages missed where all are uploaded, where none are."""

    n_leases: float
    uploading: float
    computing: float


class _Ratio:
    """Misses of one way over the ghost's in the same steps; the latest count most."""

    __slots__ = ("_ghosts", "_missed", "_steps")

    def __init__(self) -> None:
        self._steps = self._missed = self._ghosts = 0.0

    def add(self, step: Step) -> None:
        """Enter a step."""
        self._steps = FORGETTING * self._steps + 1
        self._missed = FORGETTING * self._missed + step.missed
        self._ghosts = FORGETTING * self._ghosts + step.if_uploaded

    @property
    def value(self) -> float | None:
        """The ratio; None before enough steps."""
        return self._missed / self._ghosts if self._steps >= ENOUGH and self._ghosts else None


class MissCounts:
    """Counts decode steps. Not thread-safe."""

    def __init__(self, n_slots: int) -> None:
        """Begin; a layer has `n_slots` slots."""
        self._n_slots = max(1, n_slots)
        self._ghosts: dict[int, Ghost] = {}
        self._steps: deque[Step] = deque(maxlen=STEPS_KEPT)
        self._run = 0  # steps in a row that went the same way
        self._ratios = {False: _Ratio(), True: _Ratio()}
        self._held = self._hits = 0
        self._is_full = False
        self.step = Step()
        """The one at work."""

    @property
    def hits_per_page(self) -> float:
        """How often a step asks for a page that a cache holds, on average over all steps."""
        return (self._hits + GUESSED_HITS) / (self._held + GUESSED_HELD)

    def enter(self, il: int, experts: Sequence[int], n_missing: int) -> None:
        """Enter a lease of the step at work."""
        ghost = self._ghosts.get(il)
        if ghost is None:
            ghost = self._ghosts[il] = Ghost(self._n_slots)
        self._held += len(ghost.lru)
        if_uploaded, if_frozen = ghost.lease(experts)
        self._hits += len(experts) - if_uploaded
        step = self.step
        step.missed += n_missing
        step.leases += n_missing > 0
        step.if_uploaded += if_uploaded
        step.if_frozen += if_frozen

    def keep(self, *, computing: bool) -> Step:
        """Keep the step at work, which went this way, among the latest."""
        step, steps = self.step, self._steps
        if not self._is_full and all(len(g.lru) >= g.n_slots for g in self._ghosts.values()):
            self._is_full = True
            steps.clear()
        step.computing = computing
        self._run = self._run + 1 if steps and steps[-1].computing == computing else 1
        steps.append(step)
        if self._run > SETTLING[computing]:
            self._ratios[computing].add(step)
        return step

    def freeze(self) -> None:
        """Let the frozen caches be what the others are now."""
        for ghost in self._ghosts.values():
            ghost.frozen = frozenset(ghost.lru)

    def average(self) -> Misses | None:
        """Return what a step misses either way; None before any has missed something."""
        steps = self._steps
        n_leases = fmean(step.leases for step in steps) if steps else 0.0
        if not n_leases:
            return None
        if_uploaded = fmean(step.if_uploaded for step in steps)
        uploads, stale = self._ratios[False].value, self._ratios[True].value
        computing = fmean(step.missed if step.computing else step.if_frozen for step in steps)
        return Misses(
            n_leases=n_leases, uploading=if_uploaded * (1.0 if uploads is None else uploads),
            computing=computing if stale is None else if_uploaded * stale,
        )  # fmt: skip
