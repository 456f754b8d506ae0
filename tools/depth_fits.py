"""Which stand-ins a calibration fits, and how its plans use them.

Two kinds: feed-forwards that keep most of their neurons, spread over many layers, with maps of
low rank for attentions where that saves more time for its divergence; and such maps in the place
of the sub-blocks that a search found cheapest to leave out. Each is fitted by itself, in closed
form; where torch is there a plan's are then trained together.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from edgeroute.models.base import Hparams
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.skippers.plan import SUB_BLOCKS, DepthPlan
from edgeroute.skippers.static import Choice, Costs, Unit, leave_out
from edgeroute.tools.depth_texts import Windows
from edgeroute.tools.standin_records import StandInParams, StandInShape, StandInTensor
from edgeroute.tools.standin_study import Rival, Study, study
from edgeroute.tools.standin_work import Work
from edgeroute.tools.standins import ARCHITECTURES, StandIns, fit_plan

Progress = Callable[[str, int, int], None]

NARROW: Final = (0.15, 0.10, 0.05, 0.20)
"""Shares of the compute that narrower feed-forwards save, the most wanted first."""
LOW_RANK: Final = (0.10, 0.05)
"""Shares that low rank saves before its own cost."""
MIN_TOKENS: Final = 1024
"""Fewer to fit to are no use."""
_RANK_PART: Final = 8  # a rank is the model's width over this
_ATTENTION_RANK_PART: Final = 16
_F16_TIMES: Final = 3  # the bytes of four-bit weights, which most models are stored in
_N_STUDY: Final = 2560  # tokens
_TRAINED: Final = "trained.npz"


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedPlan:
    """A plan with its stand-ins, by the names in models/standins.py."""

    plan: DepthPlan
    tensors: Mapping[str, StandInTensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fits:
    """Fits stand-ins of one model.

    Attributes:
        model: the file.
        hparams, costs: of it; in weights.
        times: in nanoseconds.
        kl: divergence with one sub-block alone left out.
        texts: windows to fit to.
        folder: gives the folder where one part of the work is kept.
        progress: told of every layer.
        threads: that training takes.
        train_s: seconds of training for each plan; 0 where it cannot be done.
    """

    model: Path
    hparams: Hparams
    costs: Costs
    times: Costs
    kl: Mapping[Unit, float]
    texts: Windows
    folder: Callable[[str], Path]
    progress: Progress
    threads: int = 1
    train_s: float = 0.0

    def study(self) -> Study:
        """Measure what narrowing each feed-forward costs."""
        n = max(2, _N_STUDY // self.texts.shape[1])
        return study(self.model, self.texts[:n], work=self.folder("study"), progress=self.progress)

    def narrow(self) -> dict[str, tuple[StandInShape, ...]]:
        """Return plans of narrower feed-forwards by name, the most wanted first."""
        found, shapes, attentions = self.study(), {}, self._attentions()
        for save in NARROW:
            try:
                shapes[f"narrow-{100 * save:.0f}"] = found.shapes(save, self.times.ffn, attentions)
            except UsageError:  # a small model has too little to save in its feed-forwards
                continue
        return shapes

    def _attentions(self) -> list[Rival]:
        """Return what maps of low rank in the place of single attentions save, and risk."""
        rank = self.hparams.n_embd // _ATTENTION_RANK_PART
        n = 2 * rank * self.hparams.n_embd
        found = []
        for unit, kl in self.kl.items():
            n_attn, time = self.costs.of(unit), self.times.of(unit)
            if unit.part == "attn" and rank and n_attn > _F16_TIMES * n:
                shape = StandInShape(il=unit.il, part="attn", rank=rank)
                found.append(Rival(shape, kl, n_attn - n, time * (1 - _F16_TIMES * n / n_attn)))
        return found

    def fit(self, name: str, shapes: Sequence[StandInShape], n_windows: int) -> FittedPlan:
        """Fit one plan's stand-ins to so many windows, or go on where that was stopped.

        Raises:
            UsageError, UnsupportedModelError, ModelFileError: see fit_plan.
        """
        params = StandInParams(
            work=self.folder(name),
            progress=lambda phase, done, total: self.progress(f"{phase} of {name}", done, total),
        )
        found = self._trained(name, fit_plan(self.model, self.texts[:n_windows], shapes, params))
        units = {Unit(shape.il, part) for shape in found.shapes for part in SUB_BLOCKS
                 if shape.part in (part, "layer")}  # fmt: skip
        layers = leave_out(units, self.costs.n_layer, "approximate")
        compute = self.costs.compute(layers, found.n_weights)
        tensors = {f"{name}/{tensor}": values for tensor, values in found.tensors.items()}
        return FittedPlan(plan=DepthPlan(name=name, layers=layers, compute=compute),
                          tensors=tensors)  # fmt: skip

    def _trained(self, name: str, found: StandIns) -> StandIns:
        """Train a plan's stand-ins together, or bring back what that gave before."""
        if not self.train_s:
            return found
        from edgeroute.tools.train_standins import train_standins

        work = Work(self.folder(name), f"trained {name}")
        kept = work.read_tensors(_TRAINED)
        if kept is not None:
            return replace(found, tensors=kept)
        with GGUFFile.open(self.model) as file:
            made = train_standins(
                file, found, self.texts, time.monotonic() + self.train_s, self.threads,
                lambda phase, done, total: self.progress(f"{phase} {name}", done, total),
            ).standins  # fmt: skip
        work.write_tensors(_TRAINED, made.tensors)
        return made

    def n_affordable(self, seconds: float, gflop_s: float, *, narrow: bool) -> int:
        """Return how many windows can be fitted to in a time; 0 if too few to be of use.

        Two streams pass all layers; narrow ones also need second moments of the neurons, and
        a solution of as many equations for each strength of the ridge.
        """
        hp, n_window = self.hparams, self.texts.shape[1]
        per_token = 4.0 * (self.costs.total - self.costs.head)
        fixed = 0.0
        if narrow:
            per_token += 2.0 * hp.n_layer * hp.n_ff**2
            fixed = hp.n_layer * 2 / 3 * hp.n_ff**3
        n = int((seconds * gflop_s * 1e9 - fixed) / (per_token * n_window))
        return min(n, len(self.texts)) if n * n_window >= MIN_TOKENS else 0


def can_fit(hparams: Hparams) -> bool:
    """Whether stand-ins can be fitted for such a model."""
    return hparams.arch in ARCHITECTURES and hparams.moe is None


def low_rank_shapes(
    hparams: Hparams, costs: Costs, choices: Sequence[Choice]
) -> dict[str, tuple[StandInShape, ...]]:  # fmt: skip
    """Return plans that replace what a search left out by maps of low rank, by name."""
    rank, shapes = max(1, hparams.n_embd // _RANK_PART), {}
    for save in LOW_RANK:
        near = [c for c in choices if abs(costs.share(c.units) - save) < costs.layer_share]
        if near:
            choice = min(near, key=lambda c: abs(costs.share(c.units) - save))
            shapes[f"rank-{100 * save:.0f}"] = tuple(
                StandInShape(il=unit.il, part=unit.part, rank=rank) for unit in sorted(choice.units)
            )
    return shapes


def numpy_gflop_s(n_embd: int, n_ff: int) -> float:
    """Measure how fast numpy multiplies matrices of a model's shape, in 1e9 operations."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((256, n_embd), dtype=np.float32)
    weight = rng.standard_normal((n_ff, n_embd), dtype=np.float32)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        x @ weight.T
        best = min(best, time.perf_counter() - began)
    return 2.0 * x.size * n_ff / best / 1e9
