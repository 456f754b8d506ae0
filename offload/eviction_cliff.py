"""The LRU cliff: with fewer slots than one token uses, recency evicts what comes next.

A warning costs nothing; what the slots would be worth under another policy is simulated.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from edgeroute.offload.eviction import PolicyParams
from edgeroute.offload.replay import choose_policy
from edgeroute.offload.trace import Trace, TraceMeta, make_step
from edgeroute.runtime.errors import CapacityError, UsageError

CANDIDATES = ("least-stale", "static", "hobbit", "mru")
"""Policies that keep part of a cycle longer than the slots, best first where equal."""

_N_TOKENS = 40
_WARMUP_TOKENS = 6
_MAX_SIM_LAYERS = 12
_KEEP = 0.6  # share of a token's experts that the next one uses again, as trained models do
_SEED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleShape:
    """One token's demand on a pool: layers, experts each has, experts each uses.

    Raises:
        UsageError: sizes that no model has.
    """

    n_layer: int
    n_expert: int
    n_expert_used: int

    def __post_init__(self) -> None:
        if not (self.n_layer >= 1 and 1 <= self.n_expert_used <= self.n_expert):
            raise UsageError(f"no model has the shape {self}")

    @property
    def n_slots(self) -> int:
        """Pages that one token uses: the smallest useful number of slots for LRU."""
        return self.n_layer * self.n_expert_used


@dataclass(frozen=True, slots=True, kw_only=True)
class CliffReport:
    """Whether slots are fewer than one token's cycle, and what to do then.

    `zero_below` is the exact cliff: with fewer slots LRU never hits while decoding one
    token at a time, whatever is chosen. `smallest_useful` slots hold a whole cycle.
    `fallback` is None above the cliff; below it, the policy with most hits in the simulation
    of a repeating and of a drifting cycle, whose hit rates (LRU's too) are `repeating` and
    `drifting`.
    """

    is_below: bool
    n_slots: int
    zero_below: int
    smallest_useful: int
    fallback: str | None
    repeating: Mapping[str, float]
    drifting: Mapping[str, float]

    @property
    def warning(self) -> str | None:
        """One sentence for the user; None above the cliff."""
        if not self.is_below:
            return None
        return (
            f"{self.n_slots} expert slots are fewer than the {self.smallest_useful} that one "
            f"token uses, so least-recently-used eviction would keep "
            f"{'nothing' if self.n_slots < self.zero_below else 'next to nothing'}; using "
            f"{self.fallback} instead; raise the memory budget to {self.smallest_useful} slots"
        )


def check_cliff(n_slots: int, shape: CycleShape) -> CliffReport:
    """Compare slots with one token's cycle, and choose a fallback below it (in about 0.2 s).

    Raises:
        CapacityError: the slots do not even hold one layer's experts of one token.
    """
    if n_slots < shape.n_expert_used:
        raise CapacityError(
            f"{n_slots} expert slots cannot hold the {shape.n_expert_used} experts that a token "
            f"uses in one layer; raise the memory budget to at least {shape.n_expert_used} slots"
        )
    is_below = n_slots < shape.n_slots
    repeating = _simulate(n_slots, shape, 1.0) if is_below else {}
    drifting = _simulate(n_slots, shape, _KEEP) if is_below else {}
    fallback = None
    if is_below:
        fallback = max(CANDIDATES, key=lambda name: repeating[name] + drifting[name])
    return CliffReport(
        is_below=is_below,
        n_slots=n_slots,
        zero_below=shape.n_expert_used * (shape.n_layer - 1) + 1,
        smallest_useful=shape.n_slots,
        fallback=fallback,
        repeating=repeating,
        drifting=drifting,
    )


def cyclic_trace(shape: CycleShape, n_tokens: int, keep: float, seed: int = _SEED) -> Trace:
    """Make a trace whose tokens use each expert of the token before with probability `keep`."""
    rng = random.Random(seed)
    experts = range(shape.n_expert)
    meta = TraceMeta(
        model="cycle",
        n_layer=shape.n_layer,
        n_expert=shape.n_expert,
        n_expert_used=shape.n_expert_used,
        page_bytes=0,
        layers=tuple(range(shape.n_layer)),
    )
    routes = [rng.sample(experts, shape.n_expert_used) for _ in range(shape.n_layer)]
    steps = []
    for _ in range(n_tokens):
        steps.append(make_step(meta, False, list(enumerate(routes))))
        for il, route in enumerate(routes):
            kept = [expert for expert in route if rng.random() < keep]
            others = [expert for expert in experts if expert not in kept]
            routes[il] = kept + rng.sample(others, shape.n_expert_used - len(kept))
    return Trace(meta=meta, steps=tuple(steps))


def _simulate(n_slots: int, shape: CycleShape, keep: float) -> Mapping[str, float]:
    """Hit rates of LRU, the candidates and Belady, on fewer layers and slots in proportion."""
    n_layer = min(shape.n_layer, _MAX_SIM_LAYERS)
    small = CycleShape(n_layer=n_layer, n_expert=shape.n_expert, n_expert_used=shape.n_expert_used)
    slots = max(shape.n_expert_used, n_slots * n_layer // shape.n_layer)
    slots = min(slots, small.n_slots - 1)
    trace = cyclic_trace(small, _N_TOKENS, keep)
    params = PolicyParams(warmup_tokens=_WARMUP_TOKENS)
    return choose_policy(trace, slots, ("lru", *CANDIDATES), params).hit_ratios
