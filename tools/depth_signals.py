"""Measures what depth policies decide by: each sub-block's own weight, and how states turn."""

from collections.abc import Callable, Iterable, Sequence
from typing import Final, cast

import numpy as np

from edgeroute.skippers.plan import SUB_BLOCKS, DepthPlan
from edgeroute.skippers.static import Matrix, Signals, Unit, Units, leave_out
from edgeroute.tools.depth_probe import Probe, Score, Window
from edgeroute.tools.depth_work import Work

Done = Callable[[int, int], None]
"""Takes how many of a phase's steps are done, and of how many."""

_NAME: Final = "search"


class Lab:
    """Scores sets of sub-blocks on a few windows; every result is kept in the work folder.

    The full model runs over the windows when the first score is computed, not before: a
    calibration that goes on finds most of them done.
    """

    def __init__(self, probe: Probe, texts: Sequence[Sequence[int]], work: Work) -> None:
        """Get ready.

        Args:
            probe: the model.
            texts: token ids of the windows.
            work: where results are kept.
        """
        self.probe = probe
        self.n_layer = probe.n_layer
        self._texts = texts
        self._work = work
        self._windows: list[Window] = []

    @property
    def windows(self) -> list[Window]:
        """The windows, run by the full model."""
        if not self._windows:
            self._windows = [self.probe.window(text) for text in self._texts]
        return self._windows

    def kl(self, units: Units) -> float:
        """Return the mean divergence with these sub-blocks skipped, nats."""
        found = self._work.value(f"skip {show_units(units)}", lambda: self._score(units).mean_kl)
        return float(cast(float, found))

    def cosines(self) -> Matrix:
        """Return the mean cosines between states: see Signals."""
        found = self._work.value("cosines", lambda: mean_cosines(self.windows).tolist())
        return np.array(found, np.float64)

    def _score(self, units: Units) -> Score:
        plan = DepthPlan(name=_NAME, layers=leave_out(units, self.n_layer))
        return Score.join(self.probe.score(window, plan.steps()) for window in self.windows)


def measure_signals(
    lab: Lab, layers: Sequence[int], done: Done = lambda _done, _total: None, *, whole: bool = True
) -> Signals:
    """Leave every sub-block of some layers out alone, and compare the states between layers.

    Args:
        lab: scores.
        layers: those that may be left out; others are taken for priceless.
        done: told after each measurement.
        whole: leave whole layers out as well; else one is taken to cost what its parts cost.
    """
    kl: dict[Unit, float] = {}
    kl_layer = np.full(lab.n_layer, np.inf)
    n_each = len(SUB_BLOCKS) + whole
    for i, il in enumerate(layers):
        both = [Unit(il, part) for part in SUB_BLOCKS]
        for j, unit in enumerate(both):
            kl[unit] = lab.kl(frozenset([unit]))
            done(n_each * i + j + 1, n_each * len(layers))
        kl_layer[il] = lab.kl(frozenset(both)) if whole else sum(kl[unit] for unit in both)
        done(n_each * (i + 1), n_each * len(layers))
    return Signals(cosines=lab.cosines(), kl=kl, kl_layer=kl_layer)


def mean_cosines(windows: Iterable[Window]) -> Matrix:
    """Average over tokens the cosine between states, F64 (n_layer + 1, n_layer + 1).

    Position 0 is left out: its state is hundreds of times larger than others, and alike in
    all layers.
    """
    total, n = None, 0
    for window in windows:
        states = window.states[:, 1:]
        norms = np.linalg.norm(states, axis=2, keepdims=True)
        unit = states / np.maximum(norms, np.float32(1e-30))
        sums = np.einsum("ite,jte->ij", unit, unit, optimize=True).astype(np.float64)
        total = sums if total is None else total + sums
        n += states.shape[1]
    assert total is not None and n
    return np.asarray(total / n, np.float64)


def show_units(units: Iterable[Unit]) -> str:
    """Name sub-blocks: `3.attn 4.ffn`; sorted."""
    return " ".join(f"{unit.il}.{unit.part}" for unit in sorted(units))


def read_units(text: str) -> Units:
    """Read what `show_units` wrote."""
    pairs = [word.split(".") for word in text.split()]
    return frozenset(Unit(int(il), "attn" if part == "attn" else "ffn") for il, part in pairs)
