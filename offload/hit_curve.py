"""Hit rate against cache size: of LRU for all sizes in one pass, of any other policy by replay.

All curves are of decode steps only, from an empty pool: prompts pass through a pool beside
its policy, and Belady is the optimum only of what the policy decides.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.offload.eviction import EvictionPolicy, PolicyParams, PoolShape
from edgeroute.offload.eviction_oracle import Belady
from edgeroute.offload.eviction_registry import make_policy
from edgeroute.offload.lru_order import Fates, settle
from edgeroute.offload.replay import BELADY, Steps, run_steps, shape_of, steps_of
from edgeroute.offload.replay_table import ReplayTable
from edgeroute.offload.segment_oracle import SegmentOracle
from edgeroute.offload.stack_distance import uses_of
from edgeroute.offload.trace import Trace
from edgeroute.runtime.errors import UsageError

LRU: Final = "lru"
_SCH: Final = "sch"
_DEFAULT = PolicyParams()


@dataclass(frozen=True, slots=True, kw_only=True)
class LruCurve:
    """Hits of LRU with every number of slots.

    Attributes:
        n_request: page requests in all.
        min_slots: pages of the largest request; fewer slots are refused by a page table.
        hits: (n_page + 1,) hits with so many slots; 0 below `min_slots`.
    """

    n_request: int
    min_slots: int
    hits: npt.NDArray[np.int64]

    def hit_ratio(self, n_slots: int) -> float:
        """Share of page requests that hit; more slots than pages are as good as all.

        Raises:
            UsageError: fewer slots than the largest request needs.
        """
        if n_slots < self.min_slots:
            raise UsageError(
                f"{n_slots} slots cannot serve a request for {self.min_slots} pages; take more"
            )
        return int(self.hits[min(n_slots, self.hits.size - 1)]) / self.n_request


def lru_curve(trace: Trace, layers: Collection[int] | None = None) -> LruCurve:
    """Count the hits of one LRU pool at all sizes, exactly as the live page table would.

    Raises:
        UsageError: no decode step, or layers that the trace has not.
    """
    uses = uses_of(trace, layers)
    hits = _hits_by_size(settle(uses), uses.n_page)
    hits[: uses.max_request] = 0
    return LruCurve(n_request=uses.page.size, min_slots=uses.max_request, hits=hits)


def _hits_by_size(fates: Fates, n_page: int) -> npt.NDArray[np.int64]:
    known = ~fates.is_first
    sure = fates.between[known] + fates.n_peer[known]  # hits with so many slots or more
    hits = np.cumsum(np.bincount(sure, minlength=n_page + 1))[: n_page + 1]
    for extra in range(1, int(fates.n_peer.max())):  # with that many slots more it may hit
        lucky = known & (fates.n_peer > extra) & fates.hits[:, extra - 1]
        hits += np.bincount(fates.between[lucky] + extra, minlength=n_page + 1)
    return hits


def hit_curve(
    trace: Trace,
    policy: str,
    sizes: Iterable[int],
    layers: Collection[int] | None = None,
    params: PolicyParams = _DEFAULT,
) -> tuple[float, ...]:
    """Hit ratio of a policy in one pool of the trace's layers, or some, by number of slots.

    Args:
        policy: a registered name, `belady` for the optimum, or `sch16` for the policy that
            knows the next 16 tokens (or any other number).

    Raises:
        CapacityError: a layer of some step asks for more pages than there are slots.
        UsageError: no decode step, no such policy, no slot, or layers that the trace has not.
    """
    if policy == LRU:
        curve = lru_curve(trace, layers)
        return tuple(curve.hit_ratio(n) for n in sizes)
    pool = _Pool(shape_of(trace, layers), _decode_steps(trace, layers))
    return tuple(pool.hit_ratio(policy, n, params) for n in sizes)


def layer_hit_ratios(
    trace: Trace, policy: str, n_slots: int, params: PolicyParams = _DEFAULT
) -> dict[int, float]:
    """Hit ratio of each layer that has decode steps, with a pool of `n_slots` of its own.

    Args:
        policy: as for `hit_curve`.

    Raises:
        CapacityError: a layer of some step asks for more pages than there are slots.
        UsageError: no decode step, no such policy, or no slot.
    """
    by_layer: dict[int, Steps] = {}
    for _, wanted in _decode_steps(trace, None):
        for pages in wanted:
            by_layer.setdefault(pages[0] // trace.meta.n_expert, []).append((False, [pages]))
    return {
        il: _Pool(shape_of(trace, [il]), by_layer[il]).hit_ratio(policy, n_slots, params)
        for il in sorted(by_layer)
    }


def _decode_steps(trace: Trace, layers: Collection[int] | None) -> Steps:
    steps = [step for step in steps_of(trace, layers) if not step[0]]
    if not any(wanted for _, wanted in steps):
        raise UsageError("hit rates are of decode steps; this trace has none of these layers")
    return steps


@dataclass(frozen=True, slots=True)
class _Pool:
    """Steps made ready to run several times."""

    shape: PoolShape
    steps: Steps

    def hit_ratio(self, policy: str, n_slots: int, params: PolicyParams) -> float:
        table = ReplayTable(n_slots, self._policy(policy, n_slots, params), self.shape)
        run_steps(table, self.steps)
        return table.decode.snapshot().total.hit_ratio

    def _policy(self, name: str, n_slots: int, params: PolicyParams) -> EvictionPolicy:
        if name == BELADY:
            return Belady(self.shape, [pages for _, wanted in self.steps for pages in wanted])
        n_token = name.removeprefix(_SCH)
        if name != n_token and n_token.isdecimal() and len(n_token) < 10:
            steps = [wanted for _, wanted in self.steps]
            return SegmentOracle(self.shape, steps, int(n_token))
        return make_policy(name, self.shape, n_slots, params)
