"""Which eviction policy suits a model: its own latest routes, replayed through each.

Replays take the time that nobody waits for anything, and little of it.
"""

from collections.abc import Collection, Iterable

from edgeroute.offload.eviction_registry import make_policy
from edgeroute.offload.expert_pool import ExpertPool
from edgeroute.offload.replay import choose_policy
from edgeroute.offload.trace import Trace
from edgeroute.runtime.errors import CapacityError

CANDIDATES = ("lru", "lfu", "lfru", "hobbit", "least-stale")
MIN_GAIN = 0.005
"""Hit rate that another policy must bring to be worth a change."""
STEP_LAYERS = 1152
"""Steps times layers that are replayed: a few tenths of a second over all candidates."""
MIN_STEPS = 24
EARLY_GAIN = 0.02
"""The same where fewer steps are known than would be replayed."""


def latest(trace: Trace) -> Trace | None:
    """Return the last decode steps of a trace, at most as many as are replayed; None if too few."""
    steps = [step for step in trace.steps if not step.prefill]
    if len(steps) < MIN_STEPS:
        return None
    return Trace(meta=trace.meta, steps=tuple(steps[-_most_steps(trace) :]))


def _most_steps(trace: Trace) -> int:
    return max(MIN_STEPS, STEP_LAYERS // len(trace.meta.layers))


def better_policy(
    trace: Trace, n_slots: int, current: str, layers: Collection[int], min_gain: float = MIN_GAIN
) -> str | None:
    """Name the policy that a pool should change to; None where that gains too little.

    Raises:
        CapacityError: a step asks for more pages of a layer than there are slots.
    """
    names = tuple(dict.fromkeys((current, *CANDIDATES)))
    choice = choose_policy(trace, n_slots, names, layers=layers)
    gain = choice.hit_ratios[choice.name] - choice.hit_ratios[current]
    return choice.name if gain > min_gain else None


def change_policies(pools: Iterable[ExpertPool], trace: Trace, min_gain: float) -> bool:
    """Give each pool the policy that would have served a trace best; return if any changed."""
    changed = False
    if len(trace.steps) < _most_steps(trace):
        min_gain = max(min_gain, EARLY_GAIN)
    for pool in pools:
        table = pool.table
        layers = [layer.il for layer in pool.plan.layers]
        try:
            better = better_policy(trace, table.n_slots, table.policy.name, layers, min_gain)
        except CapacityError:  # several sequences at once, more than a replay can hold
            continue
        if better is not None:
            table.set_policy(make_policy(better, pool.shape, table.n_slots))
            changed = True
    return changed
