"""Depth plans against the controls they must beat, at the same executed compute.

Each plan of a model's depth file is set beside block influence (ShortGPT), even spacing and
chance, which leave out whole layers, and part of one, up to what the plan saves: they never
compute less than it. Quality on text that no calibration saw, prose and code apart; speed in
alternating pairs. A plan with stand-ins is also set beside leaving the same sub-blocks out.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from edgeroute.config import RunParams
from edgeroute.loaded import LoadedModel
from edgeroute.models.depth_file import DepthFile, find_depth_file
from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.plan import DepthPlan
from edgeroute.skippers.plan_json import plans_from_json
from edgeroute.skippers.static import (
    Costs,
    Protect,
    Signals,
    Units,
    by_chance,
    by_influence,
    fill,
    leave_out,
    left_out,
    uniform,
)
from edgeroute.tools.bench import depth_report, pairs
from edgeroute.tools.bench.depth_report import Found, Point
from edgeroute.tools.bench.report import BenchParams, Report
from edgeroute.tools.convert.moe_text import TextParams, default_windows
from edgeroute.tools.depth_probe import Probe, Score, Window, costs_of
from edgeroute.tools.depth_signals import mean_cosines
from edgeroute.tools.depth_speed import N_PROMPT, measure_speed
from edgeroute.tools.perplexity import held_out_texts, windows

N_WINDOW: Final = 256
MAX_POINTS: Final = 10
SEEDS: Final = (1, 2, 3)
"""Of the plans by chance, whose mean is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthParams:
    """What to measure.

    Attributes:
        plans: the depth file; None is the model's own.
        n_windows: windows of N_WINDOW tokens, of prose and as many of code.
        protect: layers that no control leaves out either.
    """

    plans: Path | None = None
    n_windows: int = 4
    protect: Protect = field(default_factory=Protect)


@dataclass(frozen=True, slots=True)
class _Open:
    """A model, its depth file's stand-ins loaded, and its plans, the fullest first."""

    probe: Probe
    costs: Costs
    plans: tuple[DepthPlan, ...]
    n_vocab: int


def run(params: BenchParams, progress: pairs.Progress, wanted: DepthParams) -> Report:
    """Measure every plan and its controls.

    Raises:
        UsageError: the model has not been calibrated.
        DepthFileError, ModelFileError: its depth file cannot be used.
        CapacityError: the model does not fit memory as a whole.
    """
    with _opened(params, wanted) as opened:
        signals = _signals(opened.probe)
        rivals = [_rivals(plan, opened.costs, signals, wanted.protect) for plan in opened.plans]
        scores = _scores(params.path, opened, rivals, wanted.n_windows, progress)
        points = []
        for plan, found in zip(opened.plans, scores, strict=True):
            progress(f"speed of {plan.name}")
            text = [i % opened.n_vocab for i in range(N_PROMPT + params.tokens)]
            speed = measure_speed(opened.probe, plan.steps(), plan.name, text,
                                  n_tokens=params.tokens, n_pairs=params.reps)  # fmt: skip
            points.append(Point(plan=plan, scores=found, speed=speed))
    return depth_report.make_report(Found(params=params, points=tuple(points),
                                          n_tokens=wanted.n_windows * (N_WINDOW - 1)))  # fmt: skip


@contextlib.contextmanager
def _opened(params: BenchParams, wanted: DepthParams) -> Iterator[_Open]:
    n_cells = max(N_WINDOW, -(-(N_PROMPT + params.tokens) // 256) * 256)
    settings = RunParams(n_ctx=n_cells, n_ubatch=N_WINDOW, threads=params.threads)
    with contextlib.ExitStack() as stack:
        loaded = stack.enter_context(contextlib.closing(LoadedModel(params.path, settings)))
        loaded.device.set_threads(params.threads)
        path = wanted.plans or find_depth_file(loaded.file)
        if path is None:
            raise UsageError(f"{params.name} has no depth file; make one with "
                             f"`edgeroute calibrate {params.name}`")  # fmt: skip
        hparams = loaded.model.hparams
        file = stack.enter_context(DepthFile(path, loaded.file, hparams))
        plans = [p for p in plans_from_json(file.plans, hparams.n_layer) if left_out(p)]
        if not plans:
            raise UsageError(f"{path} has no plan that leaves anything out; calibrate again with "
                             "a higher --max-kl")  # fmt: skip
        plans = _spread(sorted(plans, key=lambda plan: -plan.compute))
        probe = stack.enter_context(contextlib.closing(Probe(loaded)))
        stack.enter_context(probe.standing_in(file, plans))
        yield _Open(probe, costs_of(loaded), tuple(plans), hparams.n_vocab)


def _spread(plans: Sequence[DepthPlan]) -> list[DepthPlan]:
    """Keep at most MAX_POINTS, evenly over the order, both ends among them."""
    n = min(len(plans), MAX_POINTS)
    return [plans[round(i * (len(plans) - 1) / max(n - 1, 1))] for i in range(n)]


def _signals(probe: Probe) -> Signals:
    """Measure block influence on calibration text, as its authors do."""
    texts = default_windows(probe.encode, TextParams(n_tokens=4 * N_WINDOW, n_window=N_WINDOW))
    cosines = mean_cosines(probe.window(text.tolist()) for text in texts)
    return Signals(cosines=cosines, kl={}, kl_layer=np.full(probe.n_layer, np.inf))


def _rivals(
    plan: DepthPlan, costs: Costs, signals: Signals, protect: Protect
) -> dict[str, DepthPlan]:
    """Return what to measure beside a plan, by name; chance has one per seed."""
    n_layer, save = costs.n_layer, 1.0 - plan.compute
    rules: dict[str, Callable[[int], Units]] = {
        "shortgpt": lambda n: by_influence(signals, n, protect),
        "uniform": lambda n: uniform(n_layer, n, protect),
    }
    for seed in SEEDS:
        rules[f"random-{seed}"] = partial(_by_chance, n_layer, protect, seed)
    found = {"policy": plan}
    if plan.approximates:
        found["skipped"] = _skipping(left_out(plan), costs)
    return found | {name: _skipping(fill(rule, costs, save), costs) for name, rule in rules.items()}


def _by_chance(n_layer: int, protect: Protect, seed: int, n: int) -> Units:
    return by_chance(n_layer, n, protect, seed)


def _skipping(units: Units, costs: Costs) -> DepthPlan:
    layers = leave_out(units, costs.n_layer)
    return DepthPlan(name="control", layers=layers, compute=costs.compute(layers))


def _scores(
    model: Path, opened: _Open, rivals: Sequence[Mapping[str, DepthPlan]], n_windows: int,
    progress: pairs.Progress,
) -> list[dict[str, dict[str, Score]]]:  # fmt: skip
    """Score all plans on prose and on code: per point, by rival and kind of text."""
    found: list[dict[str, dict[str, Score]]] = [{name: {} for name in each} for each in rivals]
    for kind, texts in zip(("prose", "code"), held_out_texts(), strict=True):
        cut = [part for part in windows(model, texts, N_WINDOW) if len(part) == N_WINDOW]
        cut = [cut[i * len(cut) // n_windows] for i in range(n_windows)] if cut else []
        if not cut:
            raise UsageError(f"this Python installation has no {kind} for {N_WINDOW} tokens")
        parts: list[dict[str, list[Score]]] = [{name: [] for name in each} for each in rivals]
        for i, tokens in enumerate(cut):
            progress(f"{kind}, window {i + 1} of {n_windows}")
            window = opened.probe.window(tokens)
            seen: dict[tuple[str, str], Score] = {}
            for mine, each in zip(parts, rivals, strict=True):
                for name, plan in each.items():
                    mine[name].append(_score(opened.probe, window, plan, seen))
        for into, mine in zip(found, parts, strict=True):
            for name, scores in mine.items():
                into[name][kind] = Score.join(scores)
    return found


def _score(
    probe: Probe, window: Window, plan: DepthPlan, seen: dict[tuple[str, str], Score]
) -> Score:
    """Score a plan, or take the score of one that computes the same."""
    key = (plan.name if plan.approximates else "", plan.key)
    if key not in seen:
        seen[key] = probe.score(window, plan.steps(), plan.name)
    return seen[key]
