"""What leaving experts out costs: rules at equal counts, calibrated on one text, judged on another.

MoDES weighs every layer by what its routed experts are worth: the mean divergence of the model
without them from the full one. Its one threshold, like the numbers of top-p and of halting, is
found by bisection so that a wanted number of experts computes per token; uniform is the
family's router with a smaller number. Computed with everything resident.
Source: MoDES (arXiv 2511.15690) and what `skippers.experts` names.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

import click
import numpy as np
import numpy.typing as npt

from edgeroute.config import RunParams
from edgeroute.loaded import LoadedModel
from edgeroute.runtime.cells import round_cells
from edgeroute.skippers.experts import (
    SCHEMES,
    Fitted,
    LayerRule,
    Scheme,
    Weights,
    bisect,
    fit_to_count,
    layer_factors,
    layer_rules,
    mean_experts,
    span_of,
)
from edgeroute.tools.convert.moe_text import TextParams, default_windows
from edgeroute.tools.expert_routes import Logits, WatchedModel
from edgeroute.tools.perplexity import Divergence, Scorer, compare, held_out_texts, windows

Progress = Callable[[str], None]
Windows = Sequence[Sequence[int]]
Array = npt.NDArray[np.float64]

DEFAULT_SHARES: Final = (0.875, 0.75, 0.625, 0.5)
"""Of the family's own number of experts."""
HALVINGS_KL: Final = 8
"""Of the search for a divergence, which costs a run over the text each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CountParams:
    """How much text, and how many experts.

    Attributes:
        n_window: tokens of a window.
        n_kl: windows that layers are weighed on.
        n_routes: windows whose routes calibrate the numbers, those of `n_kl` among them.
        n_check: windows of prose, and as many of code, to judge on; no calibration sees them.
        budgets: experts per token and layer; None for shares of the family's number.
    """

    n_window: int = 256
    n_kl: int = 4
    n_routes: int = 8
    n_check: int = 6
    budgets: tuple[float, ...] | None = None

    def wanted(self, n_used: int) -> tuple[float, ...]:
        """The budgets, most experts first."""
        if self.budgets is not None:
            return tuple(sorted(set(self.budgets), reverse=True))
        whole = {max(1, round(share * n_used)) for share in DEFAULT_SHARES} - {n_used}
        return tuple(float(n) for n in sorted(whole, reverse=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was learnt of a model's experts.

    Attributes:
        layers: those with experts.
        kl: per such layer, divergence of the model without its routed experts, nats.
        factors: MoDES' factors.
        routes: per such layer, weights of the chosen experts (n_tokens, n_expert_used).
    """

    layers: tuple[int, ...]
    kl: tuple[float, ...]
    factors: tuple[float, ...]
    routes: tuple[Weights, ...]

    def fit(self, scheme: Scheme, n_wanted: float) -> Fitted:
        """Find a scheme's number for so many experts per token and layer."""
        return fit_to_count(scheme, self.routes, n_wanted, self.factors)

    def rules(self, scheme: Scheme, value: float) -> tuple[LayerRule, ...]:
        """Spell a scheme out."""
        return layer_rules(scheme, value, len(self.layers), self.factors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One scheme at one budget on held-out text.

    Attributes:
        value: tau, mass, ratio or count.
        n_wanted: experts per token and layer that it was calibrated for.
        n_experts: as many as it computed.
        kl_nats, kl_error: mean over windows of the divergence from the full model, and its
            standard error.
        ppl, ppl_ratio: perplexity, and over the full model's.
        top1_ratio: share of tokens with the full model's likeliest next token.
        kl_windows: each window's divergence, to compare schemes by.
    """

    scheme: Scheme
    value: float
    n_wanted: float
    n_experts: float
    kl_nats: float
    kl_error: float
    ppl: float
    ppl_ratio: float
    top1_ratio: float
    kl_windows: tuple[float, ...]


@contextlib.contextmanager
def open_watched(path: Path, n_window: int, threads: int = 1) -> Iterator[WatchedModel]:
    """Open a model with everything resident.

    Raises:
        UsageError: it has no experts, or does not fit.
    """
    n_cells = round_cells(n_window)
    params = RunParams(n_ctx=n_cells, n_ubatch=n_cells, threads=threads)
    with contextlib.closing(LoadedModel(path, params)) as loaded:
        loaded.device.set_threads(threads)
        with WatchedModel(loaded, n_cells) as watched:
            yield watched


def calibration_windows(watched: WatchedModel, params: CountParams) -> list[list[int]]:
    """Return windows of prose and code of this Python that no judgement is passed on."""
    n_tokens = max(params.n_routes, params.n_kl) * params.n_window
    found = default_windows(watched.encode, TextParams(n_tokens=n_tokens, n_window=params.n_window))
    return [[int(token) for token in window] for window in found]


def calibrate(
    watched: WatchedModel, cut: Windows, params: CountParams, progress: Progress
) -> Calibration:
    """Weigh the layers and collect routes."""
    totals = np.zeros(len(watched.layers))
    routes: list[list[Weights]] = [[] for _ in watched.layers]
    for i, window in enumerate(cut):
        full = watched.run(window).copy()
        for mine, weights in zip(routes, watched.routes(), strict=True):
            mine.append(weights)
        if i >= params.n_kl:
            continue
        progress(f"weighing {len(watched.layers)} layers on window {i + 1} of {params.n_kl}")
        for at, il in enumerate(watched.layers):
            found = _against(full, partial(watched.run_without, il=il), window)
            totals[at] += found.kl_nats
    kl = tuple(float(total / params.n_kl) for total in totals)
    return Calibration(
        layers=watched.layers, kl=kl, factors=layer_factors(kl),
        routes=tuple(np.concatenate(mine) for mine in routes),
    )  # fmt: skip


def evaluate(
    watched: WatchedModel, calibration: Calibration, cut: Windows,
    wanted: Sequence[tuple[Scheme, float]], progress: Progress,
) -> list[Point]:  # fmt: skip
    """Judge schemes, each for a number of experts, on windows that nothing was fitted to."""
    fits = [calibration.fit(scheme, n_wanted) for scheme, n_wanted in wanted]
    rules = [calibration.rules(scheme, fit.value)
             for (scheme, _), fit in zip(wanted, fits, strict=True)]  # fmt: skip
    figures = np.zeros((len(wanted), len(cut), 4))  # divergence, nats, same top, experts
    nats_full = np.zeros(len(cut))
    for at, window in enumerate(cut):
        progress(f"{len(wanted)} points on window {at + 1} of {len(cut)}")
        full = watched.run(window).copy()
        for i, rule in enumerate(rules):
            found = _against(full, partial(watched.run, rules=rule), window)
            figures[i, at] = (found.kl_nats, found.nats, found.top1_ratio,
                              mean_experts(watched.routes(), rule))  # fmt: skip
            nats_full[at] = found.nats_reference
    return [
        _point(scheme, n_wanted, fit, figures[i], nats_full)
        for i, ((scheme, n_wanted), fit) in enumerate(zip(wanted, fits, strict=True))
    ]


def _point(scheme: Scheme, n_wanted: float, fit: Fitted, figures: Array, nats_full: Array) -> Point:
    """Average over windows of equal length."""
    kl, nats, top1, n_experts = (float(mean) for mean in figures.mean(axis=0))
    n = len(figures)
    error = float(figures[:, 0].std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf
    return Point(
        scheme=scheme, value=fit.value, n_wanted=n_wanted, n_experts=n_experts, kl_nats=kl,
        kl_error=error, ppl=math.exp(nats), ppl_ratio=math.exp(nats - float(nats_full.mean())),
        top1_ratio=top1, kl_windows=tuple(float(each) for each in figures[:, 0]),
    )  # fmt: skip


def _against(full: Logits, run: Scorer, window: Sequence[int]) -> Divergence:
    return compare(lambda _: full, run, [window])


def fit_to_divergence(
    watched: WatchedModel, calibration: Calibration, cut: Windows, scheme: Scheme, max_kl: float
) -> Fitted:
    """Find a scheme's number whose mean divergence on these windows is within a limit.

    Experts fall as far as the limit lets them; each of a few halvings costs a run.

    Raises:
        UsageError: no number keeps to the limit.
    """
    full = [watched.run(window).copy() for window in cut]

    def measure(value: float) -> float:
        run = partial(watched.run, rules=calibration.rules(scheme, value))
        found = [_against(logits, run, window).kl_nats
                 for logits, window in zip(full, cut, strict=True)]  # fmt: skip
        return float(np.mean(found))

    low, high, rising = span_of(scheme, calibration.routes, calibration.factors)
    # More experts, less divergence.
    return bisect(measure, max_kl, (low, high), rising=not rising, n_halvings=HALVINGS_KL)


def judge(
    path: Path, params: CountParams, progress: Progress, threads: int = 1
) -> tuple[Calibration, list[Point]]:
    """Calibrate and evaluate all schemes at all budgets.

    Raises:
        UsageError: the model has no experts, or does not fit.
    """
    with open_watched(path, params.n_window, threads) as watched:
        fitted = calibration_windows(watched, params)
        calibration = calibrate(watched, fitted, params, progress)
        n_used = watched.moe.n_expert_used
        budgets, cut = params.wanted(n_used), check_windows(path, params)
        wanted = [(scheme, n) for n in budgets for scheme in SCHEMES if scheme != "uniform"]
        points = evaluate(watched, calibration, cut, wanted, progress)
        control: list[tuple[Scheme, float]] = [
            ("uniform", n) for n in _whole_numbers(budgets, points) if n < n_used
        ]
        points += evaluate(watched, calibration, cut, control, progress)
        return calibration, sorted(points, key=lambda point: -point.n_wanted)


def _whole_numbers(budgets: Sequence[float], points: Sequence[Point]) -> list[float]:
    """Counts that were wanted, and those on either side of what was computed."""
    found = {math.floor(n) for n in budgets}
    for point in points:
        found |= {math.floor(point.n_experts), math.ceil(point.n_experts)}
    return [float(n) for n in sorted(found, reverse=True)]


def uniform_at(points: Sequence[Point], n_experts: float, n_used: int) -> Array:
    """Work out what uniform would diverge with so many experts, window by window.

    Between two whole numbers the logarithm falls in a line, which flatters it: divergences fall
    more slowly. Above the greatest one below `n_used`, itself without divergence, they do.
    """
    known = {round(point.n_wanted): np.array(point.kl_windows)
             for point in points if point.scheme == "uniform"}  # fmt: skip
    low, high = math.floor(n_experts), math.ceil(n_experts)
    share = n_experts - low
    if low == high or low >= n_used:
        return known.get(low, np.zeros(1))
    if high >= n_used:
        return known[low] * (1 - share)
    between: Array = np.exp(np.log(known[low]) * (1 - share) + np.log(known[high]) * share)
    return between


def check_windows(path: Path, params: CountParams) -> list[list[int]]:
    """Return whole windows of held-out prose, then as many of code."""
    found: list[list[int]] = []
    for texts in held_out_texts(n_chars=16 * params.n_window * params.n_check):
        cut = [window for window in windows(path, texts, params.n_window)
               if len(window) == params.n_window]  # fmt: skip
        found += cut[: params.n_check]
    return found


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--experts", "budgets", multiple=True, type=click.FloatRange(1),
              help="Experts per token and layer; may repeat.")  # fmt: skip
@click.option("--windows", "n_check", default=6, show_default=True, type=click.IntRange(2, 1000),
              help="Windows of prose, and as many of code, to judge on.")  # fmt: skip
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 512))
def main(model: Path, budgets: tuple[float, ...], n_check: int, threads: int) -> None:
    """Print what each rule costs on MODEL, one JSON object a line."""
    params = CountParams(n_check=n_check, budgets=budgets or None)
    calibration, points = judge(model, params, lambda line: click.echo(line, err=True), threads)
    click.echo(json.dumps({"layers": calibration.layers, "kl": calibration.kl}))
    for point in points:
        click.echo(json.dumps(asdict(point)))


if __name__ == "__main__":
    main()
