"""The slow half of POLAR: which adapters should be resident, decided once per epoch.

An epoch is a number of routed requests. At its end a resident set is chosen greedily over
the recent contexts. POLAR+ doubles the epochs up to a cap, plays adapters that were seldom
played at an epoch's start, and begins again with short epochs where a drift test fires.

Source: POLAR, arXiv 2604.16583 (abstract and introduction; its code is not public). The
objective, the exploration quota and the drift reset are a reconstruction.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgeroute.runtime.errors import UsageError

Vector = NDArray[np.float64]
MAX_CONTEXTS: Final = 4096
_RECENT_ON_SHIFT: Final = 64  # contexts that still count once popularity has shifted


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochParams:
    """How the controller paces itself.

    An epoch has `first_epoch` requests and, where `doubling`, twice those of the one before
    up to `max_epoch`. Where `forced`, an epoch of L requests owes each under-sampled adapter
    ⌈ln L / 2⌉ plays, which take at most `forced_ratio` of it; an adapter gets one where its
    bound at width `forced_alpha` leads. The resident set is chosen over
    the latest `n_contexts` contexts. Where `detect_drift`, `test_slack` and `test_limit` are
    the Page-Hinkley test's tolerance and threshold in standard deviations of what it
    watches, and `keep_on_drift` is the weight of old rewards once they proved outdated.

    Raises:
        UsageError: a value outside its range.
    """

    first_epoch: int = 100
    max_epoch: int = 4000
    doubling: bool = True
    forced: bool = True
    forced_ratio: float = 0.25
    forced_alpha: float = 1.0
    n_contexts: int = 512
    detect_drift: bool = True
    test_slack: float = 0.15
    test_limit: float = 60.0
    keep_on_drift: float = 0.2

    def __post_init__(self) -> None:
        good = (
            2 <= self.first_epoch <= self.max_epoch
            and 0 <= self.forced_ratio <= 1
            and 0 <= self.forced_alpha < math.inf
            and 1 <= self.n_contexts <= MAX_CONTEXTS
            and 0 < self.test_slack < math.inf
            and 0 < self.test_limit < math.inf
            and 0 <= self.keep_on_drift <= 1
        )
        if not good:
            raise UsageError(f"epoch settings contradict each other: {self}")

    @classmethod
    def fixed(cls, epoch: int = 250) -> "EpochParams":
        """Plain POLAR: equal epochs, no forced plays, no drift test."""
        return cls(first_epoch=epoch, max_epoch=epoch, doubling=False, forced=False,
                   detect_drift=False)  # fmt: skip


@dataclass(slots=True)
class PageHinkley:
    """A one-sided test that the mean of a signal has risen.

    It sums what exceeds the mean so far (or `target`, where what it should be is known) plus
    `slack` standard deviations, and fires where the sum has risen `limit` standard
    deviations above its lowest. Never within the first `n_least` values.

    Source: Page, "Continuous inspection schemes", Biometrika 41 (1954); Hinkley, "Inference
    about the change-point from cumulative sum tests", Biometrika 58 (1971).
    """

    slack: float
    limit: float
    target: float | None = None
    n_least: int = 30
    n: int = 0
    excess: float = 0.0
    _mean: float = 0.0
    _squares: float = 0.0

    def add(self, value: float) -> bool:
        """Enter a value; True where the mean has risen, and the test begins anew."""
        self.n += 1
        step = value - self._mean
        self._mean += step / self.n
        self._squares += step * (value - self._mean)
        deviation = math.sqrt(self._squares / self.n)
        if self.n <= self.n_least or deviation == 0:
            return False
        expected = self._mean if self.target is None else self.target
        self.excess = max(0.0, self.excess + (value - expected) / deviation - self.slack)
        fired = self.excess > self.limit
        if fired:
            self.reset()
        return fired

    def reset(self) -> None:
        """Forget the signal so far."""
        self.n, self.excess, self._mean, self._squares = 0, 0.0, 0.0, 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SetProblem:
    """What a resident set is chosen by.

    Attributes:
        utilities: predicted rewards without paging, F64 (n_contexts, n_adapters).
        floor: what serves a context without any adapter, F64 (n_contexts,).
        costs: of serving an adapter that is not resident, F64 (n_adapters,).
        loads: of making an adapter resident, 0 for those that are, F64 (n_adapters,).
        n_resident: adapters there is room for.
        horizon: requests that the set will serve.
    """

    utilities: Vector
    floor: Vector
    costs: Vector
    loads: Vector
    n_resident: int
    horizon: int


def greedy_set(problem: SetProblem) -> list[int]:
    """Choose the adapters worth keeping resident, best first.

    Maximises horizon × mean over contexts of max(best resident utility, best utility less
    cost of the others) less the loads. Without loads this is facility location, monotone
    and submodular, and greedy choice is within 1 - 1/e of the best set. Ranking by mean
    utility is not the same: it keeps near-duplicates. Stops where nothing gains.

    Source: Nemhauser, Wolsey, Fisher, "An analysis of approximations for maximizing
    submodular set functions", Mathematical Programming 14 (1978).
    """
    utilities, loads = problem.utilities, problem.loads
    if not utilities.size:
        return []
    per_context = problem.horizon / len(utilities)
    served = np.maximum(problem.floor, (utilities - problem.costs).max(axis=1))
    chosen: list[int] = []
    free = np.ones(utilities.shape[1], dtype=bool)
    for _ in range(min(problem.n_resident, utilities.shape[1])):
        gains = per_context * np.maximum(utilities - served[:, None], 0).sum(axis=0) - loads
        gains[~free] = -np.inf
        best = int(gains.argmax())
        if gains[best] <= 0:
            break
        chosen.append(best)
        free[best] = False
        served = np.maximum(served, utilities[:, best])
    return chosen


@dataclass(slots=True)
class RecentContexts:
    """The latest contexts, at most `room` of F64 (d,), in a ring."""

    room: int
    d: int
    n: int = 0
    _at: int = 0
    _ring: Vector = field(init=False)

    def __post_init__(self) -> None:
        self._ring = np.zeros((self.room, self.d))

    def add(self, x: Vector) -> None:
        """Enter a context in place of the oldest."""
        self._ring[self._at] = x
        self._at = (self._at + 1) % self.room
        self.n = min(self.n + 1, self.room)

    def rows(self) -> Vector:
        """Copy the contexts, oldest first, F64 (n, d)."""
        order = (self._at - self.n + np.arange(self.n)) % self.room
        return self._ring[order]

    def keep_latest(self, n: int) -> None:
        """Forget all but the latest n."""
        self.n = min(self.n, n)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochCounts:
    """Where the controller is: what `stats` shows and a saved state keeps."""

    n_epochs: int
    epoch: int
    n_in_epoch: int
    n_reward_drifts: int
    n_popularity_drifts: int
    owed_total: float


class EpochController:
    """Counts epochs, owes exploration and watches for drift; `due` says when to plan.

    Pure bookkeeping over rows of arms; the router translates names. Not thread-safe.
    """

    def __init__(self, params: EpochParams, d: int) -> None:
        self.params = params
        self.contexts = RecentContexts(params.n_contexts, d)
        self.due = False
        self.epoch = params.first_epoch
        self.n_in_epoch = self.n_epochs = 0
        self.n_reward_drifts = self.n_popularity_drifts = 0
        self.owed_total = 0.0
        self._forced_left = 0
        self._explores = True
        self._rewards = PageHinkley(params.test_slack, params.test_limit, target=0.0)
        self._misses = PageHinkley(params.test_slack, params.test_limit)

    @property
    def plays_owed(self) -> int:
        """Plays that an epoch of the present length owes an under-sampled adapter."""
        return math.ceil(math.log(self.epoch) / 2) if self.params.forced else 0

    @property
    def may_force(self) -> bool:
        """Whether the epoch has room for another forced play."""
        return self._forced_left > 0

    def begin_exploration(self, n_plays: Vector) -> NDArray[np.int64]:
        """Owe plays for an epoch that begins: to each adapter, by row, I64 (n_adapters,).

        An adapter is under-sampled where it has fewer plays than the epochs so far, this
        one included, would have owed it; it is owed the difference, at most one epoch's.
        """
        owed = self.plays_owed if self._explores else 0
        self._explores = True
        self.owed_total += owed
        self._forced_left = int(self.params.forced_ratio * self.epoch)
        missing = np.ceil(self.owed_total - n_plays)
        return np.clip(missing, 0, owed).astype(np.int64)

    def forced(self) -> None:
        """Enter a forced play."""
        self._forced_left -= 1

    def observe(self, x: Vector, miss_loss: float) -> None:
        """Enter a routed request.

        Args:
            x: its context, F64 (d,).
            miss_loss: predicted utility it would have had more, were all adapters resident.
        """
        self.contexts.add(x)
        self.n_in_epoch += 1
        if self.params.detect_drift and self._misses.add(miss_loss):
            # What is known of the adapters still holds; only who is asked for has changed.
            self.n_popularity_drifts += 1
            self.contexts.keep_latest(_RECENT_ON_SHIFT)
            self._restart()
            self._explores = False
        if self.n_in_epoch >= self.epoch:
            self.due = True

    def learn(self, shortfall: float) -> bool:
        """Enter predicted less received reward; True where what is known proved outdated."""
        if not self.params.detect_drift or not self._rewards.add(shortfall):
            return False
        self.n_reward_drifts += 1
        self.owed_total = 0.0
        self._restart()
        return True

    def _restart(self) -> None:
        self.epoch = self.params.first_epoch
        self.n_in_epoch = 0
        self.due = True

    def close_epoch(self) -> int:
        """Begin the next epoch and return its length."""
        finished = self.n_in_epoch >= self.epoch
        if finished and self.params.doubling:
            self.epoch = min(2 * self.epoch, self.params.max_epoch)
        self.n_in_epoch = 0
        self.n_epochs += 1
        self.due = False
        return self.epoch

    def resident_changed(self) -> None:
        """Watch misses afresh: they were those of another resident set."""
        self._misses.reset()

    def counts(self) -> EpochCounts:
        """Where it is."""
        return EpochCounts(
            n_epochs=self.n_epochs, epoch=self.epoch, n_in_epoch=self.n_in_epoch,
            n_reward_drifts=self.n_reward_drifts,
            n_popularity_drifts=self.n_popularity_drifts, owed_total=self.owed_total,
        )  # fmt: skip

    def resume(self, counts: EpochCounts, contexts: Vector) -> None:
        """Go on where a saved controller was; its drift tests begin anew."""
        self.epoch = min(max(counts.epoch, self.params.first_epoch), self.params.max_epoch)
        self.n_in_epoch, self.n_epochs = counts.n_in_epoch, counts.n_epochs
        self.n_reward_drifts = counts.n_reward_drifts
        self.n_popularity_drifts = counts.n_popularity_drifts
        self.owed_total = counts.owed_total
        for x in contexts[-self.params.n_contexts :]:
            self.contexts.add(x)


def order_by_use(names: Collection[str], chosen: Sequence[str], n_resident: int) -> list[str]:
    """Fill the room that `chosen` leaves with adapters that are resident already, for free."""
    kept = [name for name in sorted(names) if name not in chosen]
    return [*chosen, *kept][:n_resident]
