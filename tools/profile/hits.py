"""Hit rates by size and policy, pooled and by layer."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from edgeroute.offload.eviction_registry import POLICIES
from edgeroute.offload.hit_curve import hit_curve
from edgeroute.offload.replay import BELADY
from edgeroute.offload.trace import Mark, Trace, TraceMeta, TraceStep, sequences
from edgeroute.tools.profile.record import Progress
from edgeroute.tools.profile.records import Curve, HitRates

N_SIZES: Final = 12
ALWAYS: Final = ("lru", "lfu", "lfru")
DEFAULT_ACTIVE: Final = "lfru"
"""What a Runtime begins with above the cliff."""
LAYER_POLICIES: Final = ("lru", BELADY)
MAX_REQUESTS: Final = 150_000
"""Requests of one replay, about a second; longer traces are replayed in part."""


def sizes_of(meta: TraceMeta) -> tuple[int, ...]:
    """Choose slot counts from half of one token's cycle to all experts, the cycle among them."""
    n_page, cycle = len(meta.layers) * meta.n_expert, cycle_of(meta)
    low = min(max(meta.n_expert_used, cycle // 2), n_page)
    found = np.unique(np.geomspace(low, n_page, N_SIZES).round().astype(int))
    nearest = int(np.argmin(np.abs(found - cycle)))
    found[nearest] = min(cycle, n_page)
    found[-1] = n_page
    return tuple(int(n) for n in np.unique(found))


def cycle_of(meta: TraceMeta) -> int:
    """Experts that one token uses over all layers: the LRU cliff."""
    return len(meta.layers) * meta.n_expert_used


def decode_part(trace: Trace, most: int = MAX_REQUESTS) -> Trace:
    """Keep the decode steps, and of a long trace the first ones of every sequence.

    Marks stay; what the live run did is left out.
    """
    per_step = max(1, cycle_of(trace.meta))
    parts = [(label, [step for step in part.steps if not step.prefill])
             for label, part in sequences(trace)]  # fmt: skip
    room, n_left = max(1, most // per_step), len(parts)
    steps: list[TraceStep] = []
    marks: list[Mark] = []
    for label, part in sorted(parts, key=lambda each: len(each[1])):
        kept = part[: max(1, (room - len(steps)) // n_left)]
        n_left -= 1
        if kept:
            marks.append(Mark(step=len(steps), label=label))
            steps += kept
    return Trace(meta=trace.meta, steps=tuple(steps), marks=tuple(marks))


def first_part(trace: Trace, most: int = MAX_REQUESTS) -> Trace:
    """Keep as many steps from the start, prompts included, as have so many requests."""
    n, kept = 0, 0
    for step in trace.steps:
        n += sum(min(size, trace.meta.n_expert) for size in step.sizes)
        if n > most:
            break
        kept += 1
    if any(not step.prefill for step in trace.steps[:kept]):
        return Trace(meta=trace.meta, steps=trace.steps[:kept])
    return decode_part(trace, most)


def hit_rates(part: Trace, active: str, progress: Progress) -> HitRates:
    """Replay the decode steps of a trace at every size, by policy.

    Args:
        part: from `decode_part`.
        active: the policy that a Runtime would use.
        progress: told of each curve.

    Raises:
        CapacityError: a step asks for more of a layer than the smallest size holds.
    """
    meta, sizes = part.meta, sizes_of(part.meta)
    largest = max((len(set(ids.tolist())) for s in part.steps for _, ids in s.parts()), default=1)
    sizes = tuple(n for n in sizes if n >= largest) or (len(meta.layers) * meta.n_expert,)
    if active not in POLICIES:
        active = DEFAULT_ACTIVE
    policies = tuple(dict.fromkeys((*ALWAYS, active, BELADY)))
    n_all = len(policies) + len(LAYER_POLICIES) + 1
    pooled = []
    for i, policy in enumerate(policies):
        pooled.append(Curve(policy=policy, n_slots=sizes,
                            hit_ratios=_ratios(part, policy, sizes)))  # fmt: skip
        progress("replaying", i + 1, n_all)
    n_layer_slots = min(meta.n_expert, max(2 * meta.n_expert_used, largest))
    layers = tuple(sorted({layer for step in part.steps for layer in step.layers}))
    by_layer = {}
    for i, policy in enumerate(dict.fromkeys((LAYER_POLICIES[0], active, *LAYER_POLICIES[1:]))):
        by_layer[policy] = tuple(
            _ratios(part, policy, (n_layer_slots,), layer)[0] for layer in layers
        )
        progress("replaying", min(n_all, len(policies) + i + 1), n_all)
    progress("replaying", n_all, n_all)
    return HitRates(
        pooled=tuple(pooled), active=active, cliff_slots=cycle_of(meta),
        layer_slots=n_layer_slots, layers=layers, by_layer=by_layer,
    )  # fmt: skip


def _ratios(
    part: Trace, policy: str, sizes: Sequence[int], layer: int | None = None
) -> tuple[float, ...]:
    layers = None if layer is None else (layer,)
    return tuple(float(each) for each in hit_curve(part, policy, sizes, layers))
