"""Searches depth plans by measured divergence: which sub-blocks to leave out for a saving."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from edgeroute.skippers.static import (
    Choice,
    Costs,
    Greedy,
    Protect,
    Signals,
    Units,
    by_influence,
    by_kl,
    contiguous,
)
from edgeroute.tools.depth_signals import Done, Lab

POINTS: Final = (0.5, 1, 2, 3, 4, 5, 6, 8)
"""Savings to find plans for, in layers of average cost."""
N_BLOCKS: Final = 2
"""Blocks of neighbours that are measured for a saving."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchParams:
    """What to search.

    Attributes:
        points: savings, rising, in layers of average cost.
        protect: layers that always run.
        max_kl: no more is left out once the divergence exceeds it, nats.
        go_on: asked before each saving whether there is time for it.
    """

    points: Sequence[float]
    protect: Protect
    max_kl: float = math.inf
    go_on: Callable[[float], bool] = lambda _n: True


def points_of(n_layer: int, protect: Protect) -> list[float]:
    """Return the default savings that a model has enough layers for: half the free ones go."""
    n_free = len(protect.layers(n_layer))
    return [n for n in POINTS if n <= max(1, n_free / 2)]


def search(
    lab: Lab, signals: Signals, costs: Costs, params: SearchParams, done: Done
) -> list[Choice]:  # fmt: skip
    """Find for each saving the set that diverges least on the lab's windows.

    The greedy search over sub-blocks competes with rules over whole layers, which are better
    where the layers of a block only make sense together, and goes on from whatever won.
    """
    found: list[Choice] = []
    greedy = Greedy(signals.kl, costs, lab.kl)
    for i, n in enumerate(params.points):
        if found and not params.go_on(n):
            break
        rivals = [Choice(units, lab.kl(units)) for units in _rules(signals, n, params.protect)]
        grown = greedy.reach(n * costs.layer_share)
        rivals += [grown] if grown is not None else []
        if not rivals:
            break
        best = min(rivals, key=lambda choice: choice.kl)
        greedy.restart(best)
        found.append(best)
        done(i + 1, len(params.points))
        if best.kl > params.max_kl:
            break
    return found


def _rules(signals: Signals, n: float, protect: Protect) -> Iterator[Units]:
    """Yield what the rules over whole layers leave out, where that is a number of layers."""
    if n == int(n) and n <= len(protect.layers(len(signals.kl_layer))):
        for rank in range(N_BLOCKS):
            yield contiguous(signals, int(n), protect, rank)
        yield by_kl(signals, int(n), protect)
        yield by_influence(signals, int(n), protect)
