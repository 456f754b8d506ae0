"""A cache that knows the next m tokens of every sequence: the hit rate it would have (SCH).

All layers of all sequences run side by side, one token of each at a time.
Source: "Not All Models Suit Expert Offloading", arXiv 2505.16056, section 3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.offload.routes import Routes, checked
from edgeroute.runtime.errors import UsageError

_CHUNK_CELLS: Final = 1 << 20
_NEVER: Final = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentCache:
    """A cache per layer and sequence, empty at first, with the next m tokens known.

    Before each token its experts are looked up, and those found are hits. Then the missing are
    loaded, and experts leave until `n_slots` are left: the one with fewest activations in the
    next m tokens first, of equals the one used longest ago. An expert of the token itself may
    leave too, as it may in the paper: unlike a runtime's, the cache is only judged between
    tokens. With `hold` it may not, as in a runtime whose tokens compute out of the cache.

    Args:
        m: 0 knows nothing and so is LRU; None knows all, keeps what is used again soonest,
            and is the optimum under the same rule.
        rho: slots per expert that a token uses.
        charge_cold: also charge the misses that fill empty slots. The paper does not.

    Raises:
        UsageError: sizes that cannot be.
    """

    n_expert: int
    n_expert_used: int
    m: int | None
    rho: float
    charge_cold: bool = False
    hold: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.n_expert_used <= self.n_expert:
            raise UsageError(f"a token cannot use {self.n_expert_used} of {self.n_expert} experts")
        if self.m is not None and self.m < 0:
            raise UsageError(f"a segment cannot have {self.m} tokens")
        if not self.rho > 0 or self.n_slots < 1:
            raise UsageError(f"rho {self.rho} leaves no slot; it must give at least one")
        if self.hold and self.n_slots < self.n_expert_used:
            raise UsageError(
                f"{self.n_slots} slots cannot hold the {self.n_expert_used} experts of a token; "
                f"rho must be at least 1"
            )

    @property
    def n_slots(self) -> int:
        """Experts that fit, per layer."""
        return min(self.n_expert, round(min(self.rho, self.n_expert) * self.n_expert_used))


def sch_counts(routes: Sequence[Routes], cache: SegmentCache) -> npt.NDArray[np.int64]:
    """Count hits and charged requests of each sequence, layers added up.

    Returns:
        (n_sequence, 2). Which requests are charged is the same for every m, so that hits of
        different m compare.

    Raises:
        UsageError: routes whose tokens do not use `n_expert_used` of `n_expert`.
    """
    rows = [(i, ids) for i, one in enumerate(routes) for ids in one.ids.values()]
    for _, ids in rows:
        if ids.shape[1] != cache.n_expert_used:
            raise UsageError(
                f"routes of {ids.shape[1]} experts a token, but {cache.n_expert_used} were said"
            )
        checked(ids, cache.n_expert)
    rows.sort(key=lambda row: -len(row[1]))  # so that those still running come first
    counts = np.zeros((len(routes), 2), np.int64)
    n_side = max(1, _CHUNK_CELLS // cache.n_expert)
    for at in range(0, len(rows), n_side):
        part = rows[at : at + n_side]
        np.add.at(counts, [i for i, _ in part], _Side([ids for _, ids in part], cache).run())
    return counts


class _Side:
    """Rows of tokens, the longest first, each with a cache of its own."""

    def __init__(self, rows: list[npt.NDArray[np.uint16]], cache: SegmentCache) -> None:
        self.cache = cache
        used = cache.n_expert_used
        lengths = np.array([len(ids) for ids in rows])
        self.n_token = int(lengths[0])
        # How many rows have a token t.
        self.n_alive = np.searchsorted(-lengths, -np.arange(self.n_token), side="left").tolist()
        self.ids = np.zeros((self.n_token, len(rows), used), np.int32)
        for row, ids in enumerate(rows):
            self.ids[: len(ids), row] = ids
        self.row = np.arange(len(rows))[:, None]
        self.inside = np.zeros((len(rows), cache.n_expert), bool)
        self.keys = np.zeros((len(rows), cache.n_expert), np.int64)
        self.counts = np.zeros((len(rows), 2), np.int64)

    def run(self) -> npt.NDArray[np.int64]:
        """Let all tokens pass; returns (n_row, 2) hits and charged requests."""
        n_slots, used = self.cache.n_slots, self.cache.n_expert_used
        filled = np.zeros(len(self.row), np.int64)
        enter = self._all_known() if self.cache.m is None else self._segment_known(self.cache.m)
        for t, alive in enumerate(self.n_alive):
            ids, row = self.ids[t, :alive], self.row[:alive]
            inside = self.inside[:alive]
            n_hit = inside[row, ids].sum(axis=1)
            inside[row, ids] = True
            cold = np.minimum(used - n_hit, n_slots - filled[:alive])
            filled[:alive] += cold
            self.counts[:alive, 0] += n_hit
            self.counts[:alive, 1] += used - (0 if self.cache.charge_cold else cold)
            enter(t)
            if n_slots < self.cache.n_expert:
                self._evict(ids, row, inside)
        return self.counts

    def _segment_known(self, m: int) -> Callable[[int], None]:
        """Keys are activations in the next m tokens, then how late the last use was."""
        keys, last, n_alive = self.keys, np.zeros_like(self.keys), self.n_alive
        used = self.cache.n_expert_used
        span = self.n_token * used + 1
        rank = np.arange(1, used + 1)

        def count(t: int, by: int) -> None:
            if t < self.n_token:
                keys[self.row[: n_alive[t]], self.ids[t, : n_alive[t]]] += by

        def enter(t: int) -> None:
            at = self.row[: n_alive[t]], self.ids[t, : n_alive[t]]
            now = t * used + rank
            keys[at] += now - last[at]
            last[at] = now
            if m:
                count(t, -span)
                count(t + m, span)

        for t in range(min(m, self.n_token)):
            count(t, span)
        return enter

    def _all_known(self) -> Callable[[int], None]:
        """Keys are how soon the next use is; of those never used again, any order."""
        n_expert, n_alive = self.cache.n_expert, self.n_alive
        coming = np.empty_like(self.ids)
        following = np.full(self.keys.shape, self.n_token, np.int32)
        for t in range(self.n_token - 1, -1, -1):
            at = self.row[: n_alive[t]], self.ids[t, : n_alive[t]]
            coming[t, : n_alive[t]] = following[at]
            following[at] = t

        def enter(t: int) -> None:
            ids = self.ids[t, : n_alive[t]]
            soon = self.n_token - coming[t, : n_alive[t]].astype(np.int64)
            self.keys[self.row[: n_alive[t]], ids] = soon * n_expert + ids

        return enter

    def _evict(
        self, ids: npt.NDArray[np.int32], row: npt.NDArray[np.intp], inside: npt.NDArray[np.bool_]
    ) -> None:
        """Keep the `n_slots` largest keys of what is inside; keys differ within a row."""
        order = np.where(inside, self.keys[: len(ids)], _NEVER)
        if self.cache.hold:
            order[row, ids] += np.iinfo(np.int64).max // 2
        cut = self.cache.n_expert - self.cache.n_slots
        least = np.partition(order, cut, axis=1)[:, cut, None]
        np.logical_and(inside, order >= least, out=inside)
