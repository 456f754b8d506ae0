"""Static plans from measured signals: which sub-blocks to leave out of every token's pass.

Rules by one signal (block influence, similarity of blocks, each layer's own divergence), a
greedy search that measures what it chooses, and the controls they must beat: even spacing and
chance.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.plan import SUB_BLOCKS, DepthPlan, LayerAct, LayerDepth, SubBlock

Matrix = npt.NDArray[np.float64]

N_LOOK: Final = 4
"""Candidates that a greedy step measures at most. Costs grow as more is left out, so an old
measurement is a lower bound, and few need a new one."""
_SMALLEST_KL: Final = 1e-6
_ROUNDING: Final = 1e-9  # of shares of the compute


class Unit(NamedTuple):
    """One sub-block of one layer."""

    il: int
    part: SubBlock


Units = frozenset[Unit]
Score = Callable[[Units], float]
"""Divergence from the full model, mean nats, when these sub-blocks are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a token costs per sub-block, and by the output head, in weights, bytes or nanoseconds.

    Of experts, those that a token uses count.
    """

    attn: tuple[int, ...]
    ffn: tuple[int, ...]
    head: int

    @property
    def n_layer(self) -> int:
        """Layers of the model."""
        return len(self.attn)

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.attn) + sum(self.ffn) + self.head

    @property
    def layer_share(self) -> float:
        """Share of all that a layer has on average."""
        return (self.total - self.head) / self.n_layer / self.total

    def of(self, unit: Unit) -> int:
        """Return the cost of one sub-block."""
        return (self.attn if unit.part == "attn" else self.ffn)[unit.il]

    def share(self, units: Iterable[Unit]) -> float:
        """Return the share of all that some sub-blocks have."""
        return sum(self.of(unit) for unit in units) / self.total

    def compute(self, layers: Sequence[LayerDepth], n_standins: int = 0) -> float:
        """Return the share that a plan multiplies with, its stand-ins' weights counted."""
        times = {"run": 1, "skip": 0, "approximate": 0, "repeat": 2}
        n = self.head + n_standins
        for il, layer in enumerate(layers):
            n += sum(times[layer.act(part)] * self.of(Unit(il, part)) for part in SUB_BLOCKS)
        return n / self.total


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Signals:
    """What calibration measured of a model, position 0 left out.

    Attributes:
        cosines: F64 (n_layer + 1, n_layer + 1), mean cosine between the residual stream before
            layer i and before layer j; n_layer stands for after the last.
        kl: divergence with one sub-block alone left out, mean nats.
        kl_layer: F64 (n_layer,), with one whole layer left out.
    """

    cosines: Matrix
    kl: Mapping[Unit, float]
    kl_layer: Matrix

    @property
    def influence(self) -> Matrix:
        """Block influence of each layer, F64 (n_layer,). Source: ShortGPT, arXiv 2403.03853."""
        return 1.0 - np.diagonal(self.cosines, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Protect:
    """Layers that always run: the first ones build the state of position 0 and the last ones
    take it apart, so that leaving one of them out costs more than a perplexity factor of 2."""

    first: int = 2
    last: int = 1

    def layers(self, n_layer: int) -> list[int]:
        """Return the layers that may be left out; at least one, in a model of two or more."""
        first = min(self.first, max(n_layer - 2, 0))
        last = min(self.last, max(n_layer - first - 1, 0))
        return list(range(first, n_layer - last))


def leave_out(units: Collection[Unit], n_layer: int, act: LayerAct = "skip",
              ) -> tuple[LayerDepth, ...]:  # fmt: skip
    """Return a plan's layers: `act` for these sub-blocks, all others run."""
    acts: Mapping[bool, LayerAct] = {True: act, False: "run"}
    return tuple(
        LayerDepth(attn=acts[Unit(il, "attn") in units], ffn=acts[Unit(il, "ffn") in units])
        for il in range(n_layer)
    )


def left_out(plan: DepthPlan) -> Units:
    """Return the sub-blocks that a plan does not run."""
    return frozenset(
        Unit(il, part) for il, layer in enumerate(plan.layers) for part in SUB_BLOCKS
        if layer.act(part) in ("skip", "approximate")
    )  # fmt: skip


# rules over whole layers


def whole_layers(costs: Costs, save: float) -> int:
    """Return how many layers of average cost save at most this share."""
    return int(save / costs.layer_share + _ROUNDING)


def by_influence(signals: Signals, n: int, protect: Protect) -> Units:
    """Leave out the `n` layers of least block influence, as ShortGPT does."""
    return _first(n, signals.influence, protect)


def by_kl(signals: Signals, n: int, protect: Protect) -> Units:
    """Leave out the `n` layers that cost least when each is left out alone."""
    return _first(n, signals.kl_layer, protect)


def contiguous(signals: Signals, n: int, protect: Protect, rank: int = 0) -> Units:
    """Leave out the `n` neighbours between whose ends the residual stream turns least.

    Source: arXiv 2403.17887 (similarity over a block instead of single layers).

    Args:
        rank: 0 for the block that turns it least, 1 for the next, and so on.
    """
    free = _free(n, len(signals.kl_layer), protect)
    starts = range(free[0], free[-1] + 2 - n)
    order = sorted(starts, key=lambda il: (-float(signals.cosines[il, il + n]), il))
    start = order[min(rank, len(order) - 1)]
    return _whole(range(start, start + n))


def uniform(n_layer: int, n: int, protect: Protect) -> Units:
    """Leave out `n` layers at even distances."""
    free = _free(n, n_layer, protect)
    return _whole(free[int((i + 0.5) * len(free) / n)] for i in range(n))


def by_chance(n_layer: int, n: int, protect: Protect, seed: int) -> Units:
    """Leave out `n` layers at random."""
    order = np.random.default_rng(seed).permutation(_free(n, n_layer, protect))
    return _whole(int(il) for il in order[:n])


def fill(rule: Callable[[int], Units], costs: Costs, save: float) -> Units:
    """Leave out as many layers as save at most so much, and a part of one more if that fits.

    Args:
        rule: what to leave out when that is so many layers.
        costs: of the model.
        save: share of the compute.
    """
    n = whole_layers(costs, save)
    units = rule(n)
    for part in sorted(SUB_BLOCKS, reverse=True):  # ffn is the larger one
        for unit in sorted(rule(n + 1) - units):
            if unit.part == part and costs.share([*units, unit]) <= save + _ROUNDING:
                return units | {unit}
    return units


def _first(n: int, values: Matrix, protect: Protect) -> Units:
    order = sorted(_free(n, len(values), protect), key=lambda il: (float(values[il]), il))
    return _whole(order[:n])


def _whole(layers: Iterable[int]) -> Units:
    return frozenset(Unit(il, part) for il in layers for part in SUB_BLOCKS)


def _free(n: int, n_layer: int, protect: Protect) -> list[int]:
    """Return the layers that may be left out, of which there must be `n`."""
    free = protect.layers(n_layer)
    if n > len(free):
        raise UsageError(f"{n} layers cannot be left out: of {n_layer}, {len(free)} are not "
                         "protected; save less, or protect fewer")  # fmt: skip
    return free


# search


class Choice(NamedTuple):
    """Sub-blocks left out, and the divergence that was measured with them."""

    units: Units
    kl: float


class Greedy:
    """Leaves out one sub-block after the other, always where a saved weight costs least.

    Only as much of a saving counts as is still missing, so that the last one is not a large
    sub-block where a small one would do.
    """

    def __init__(
        self, first: Mapping[Unit, float], costs: Costs, score: Score, n_look: int = N_LOOK
    ) -> None:
        """Start with nothing left out.

        Args:
            first: candidates, with the divergence of each alone.
            costs: what each saves.
            score: measures a set; asked for each set once, but after `restart`.
            n_look: candidates measured per step at most.
        """
        self._first = {unit: kl for unit, kl in first.items() if costs.of(unit)}
        self._costs, self._score, self._n_look = costs, score, n_look
        self._at = Choice(frozenset(), 0.0)
        self._more = dict(self._first)  # what each adds to the divergence, as last measured

    def restart(self, at: Choice) -> None:
        """Go on from a set that somebody else found."""
        self._at = at
        self._more = {unit: self._more.get(unit, kl) for unit, kl in self._first.items()
                      if unit not in at.units}  # fmt: skip

    def reach(self, save: float) -> Choice | None:
        """Leave out until so much of the compute is saved; None if it cannot be had."""
        while (missing := save - self._costs.share(self._at.units)) > _ROUNDING and self._more:
            self._at = self._step(missing)
        return None if missing > _ROUNDING else self._at

    def _step(self, missing: float) -> Choice:
        """Measure the candidates that look best until one of them is best, and leave it out."""
        more, measured = self._more, set[Unit]()
        if not self._at.units:  # what each costs alone is measured already
            measured = set(more)
        while len(measured) < len(more):
            best = self._cheapest(more, missing)
            if best in measured or len(measured) >= self._n_look:
                break
            measured.add(best)
            more[best] = self._score(self._at.units | {best}) - self._at.kl
        best = self._cheapest(measured, missing)
        return Choice(self._at.units | {best}, self._at.kl + more.pop(best))

    def _cheapest(self, units: Iterable[Unit], missing: float) -> Unit:
        """Return where the divergence per weight saved that is still missing is least."""

        def price(unit: Unit) -> tuple[float, Unit]:
            saved = min(self._costs.share([unit]), missing)
            return max(self._more[unit], _SMALLEST_KL) / saved, unit

        return min(units, key=price)
