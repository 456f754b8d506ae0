"""A budget and a policy: above the LRU cliff, at the curve's knee, and for 95 % of reuse."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.offload.hit_curve import hit_curve
from edgeroute.offload.replay import BELADY, choose_policy
from edgeroute.offload.trace import Trace
from edgeroute.tools.profile.record import Progress
from edgeroute.tools.profile.records import Advice, Curve, HitRates

CANDIDATES: Final = ("lru", "lfu", "lfru", "hobbit")
WANTED: Final = 0.95
"""Of the hits that all experts in memory would have: first uses miss at every size."""
MIN_GAIN: Final = 0.005
"""Hit rate that another policy must bring over the active one to be named instead."""
_MOST_TRIES: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a number of slots takes: `fixed_bytes` for all else, None where that is unknown."""

    slot_bytes: int
    fixed_bytes: int | None = None

    def budget(self, n_slots: int) -> int:
        """Return bytes over everything; 0 where they are unknown."""
        return 0 if self.fixed_bytes is None else self.fixed_bytes + n_slots * self.slot_bytes


def advise(part: Trace, hits: HitRates, memory: Memory, progress: Progress) -> tuple[Advice, ...]:
    """Name budgets, the smallest first, each with the best online policy there by replay.

    Args:
        part: the decode steps that `hits` were computed from.
        hits: its curves.
        memory: what slots take.
        progress: told of each.
    """
    online = [curve for curve in hits.pooled if curve.policy != BELADY]
    sizes = online[0].n_slots
    best = np.max([curve.hit_ratios for curve in online], axis=0)
    progress("weighing budgets", 1, 4)
    least = _least(part, online, WANTED * float(best[-1]))
    wanted = (
        (max(sizes[0], hits.cliff_slots), "the least that holds what one token uses in all layers"),
        (sizes[_knee(sizes, best)], f"beyond it, memory brings less (all experts: {best[-1]:.1%})"),
        (least, f"the least that finds {WANTED:.0%} of what was used before"),
    )
    found: dict[int, Advice] = {}
    for i, (n_slots, why) in enumerate(wanted):
        if n_slots not in found:
            found[n_slots] = _at(part, hits, memory, (n_slots, why))
        progress("weighing budgets", i + 2, 4)
    return tuple(found[n] for n in sorted(found))


def _at(part: Trace, hits: HitRates, memory: Memory, what: tuple[int, str]) -> Advice:
    n_slots, why = what
    names = tuple(dict.fromkeys((hits.active, *CANDIDATES)))
    choice = choose_policy(part, n_slots, names)
    name = choice.name
    if choice.hit_ratios[name] - choice.hit_ratios[hits.active] <= MIN_GAIN:
        name = hits.active
    ratio, optimum = choice.hit_ratios[name], choice.hit_ratios[BELADY]
    return Advice(
        policy=name, n_slots=n_slots, budget_bytes=memory.budget(n_slots), hit_ratio=ratio,
        why=f"{why}; the optimum there is {optimum:.1%}",
    )  # fmt: skip


def _knee(sizes: Sequence[int], ratios: npt.NDArray[np.float64]) -> int:
    """Find the point furthest above the line from the curve's first point to its last."""
    x = np.asarray(sizes, np.float64) - sizes[0]
    y = ratios - ratios[0]
    if x[-1] <= 0 or y[-1] <= 0:
        return 0
    return int(np.argmax(y / y[-1] - x / x[-1]))


def _least(part: Trace, online: Sequence[Curve], wanted: float) -> int:
    """Halve the interval of sizes in which a policy's curve first reaches what is wanted."""
    sizes = online[0].n_slots
    at, best = min(
        (next((i for i, ratio in enumerate(c.hit_ratios) if ratio >= wanted), len(sizes) - 1), j)
        for j, c in enumerate(online)
    )
    if at == 0:
        return sizes[0]
    low, high = sizes[at - 1], sizes[at]
    for _ in range(_MOST_TRIES):
        middle = (low + high) // 2
        if middle == low:
            break
        (ratio,) = hit_curve(part, online[best].policy, (middle,))
        low, high = (low, middle) if ratio >= wanted else (middle, high)
    return high
