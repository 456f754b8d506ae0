"""Whether SCH, computed offline, ranks models and sizes as live hit rates do.

    python -m edgeroute.tools.profile.correlate A.trace B.trace ...

Each trace is one live run of one model under one budget, recorded with its paging. Its SCH is of
segments of 16 tokens and of as many experts per layer as the run had slots for.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click
import numpy as np
import numpy.typing as npt

from edgeroute.offload.locality import sch
from edgeroute.offload.routes import routes_of
from edgeroute.offload.trace import read_trace
from edgeroute.runtime.errors import UsageError
from edgeroute.tools.profile.live import live_of

SEGMENT: Final = 16
"""Tokens of lookahead."""
TARGET: Final = 0.8

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A live run: what offline analysis said of its model and size, and what it measured."""

    model: str
    n_slots: int
    share: float
    """Of all experts."""
    rho: float
    """Slots in units of the experts that one token uses."""
    sch: float
    live_hit_ratio: float
    policy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlation:
    """Two measures over the same points; 1 is perfect agreement."""

    pearson: float
    spearman: float
    n_point: int


def pearson(a: Sequence[float] | Values, b: Sequence[float] | Values) -> float:
    """Correlate values; 0 where either side does not vary.

    Raises:
        UsageError: fewer than two points, or unequally many.
    """
    left, right = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if left.shape != right.shape or left.ndim != 1 or left.size < 2:
        raise UsageError(f"a correlation needs two or more pairs, got {left.size}, {right.size}")
    left, right = left - left.mean(), right - right.mean()
    norm = float(np.sqrt((left**2).sum() * (right**2).sum()))
    return float((left * right).sum()) / norm if norm > 0 else 0.0


def spearman(a: Sequence[float] | Values, b: Sequence[float] | Values) -> float:
    """Correlate ranks; equal values share the mean of theirs."""
    return pearson(_ranks(np.asarray(a, np.float64)), _ranks(np.asarray(b, np.float64)))


def _ranks(values: Values) -> Values:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: Values = last - (counts - 1) / 2.0
    return means[place.reshape(-1)]


def point_of(path: Path) -> Point:
    """Compute a trace's SCH at its own live size.

    Raises:
        TraceError: it is no trace.
        UsageError: it holds nothing about the live run, or no sequence long enough.
    """
    trace = read_trace(path)
    live, meta = live_of(trace), trace.meta
    if live is None:
        raise UsageError(f"{path.name} tells nothing of its live run: record it anew")
    rho = live.n_slots / (len(meta.layers) * meta.n_expert_used)
    found = sch(routes_of(trace), meta.n_expert, meta.n_expert_used, SEGMENT, rho)
    return Point(
        model=meta.model, n_slots=live.n_slots, rho=rho, sch=found,
        share=live.n_slots / (len(meta.layers) * meta.n_expert),
        live_hit_ratio=live.hit_ratio, policy=live.policy,
    )  # fmt: skip


def correlation(points: Sequence[Point]) -> Correlation:
    """Correlate SCH with live hit rates over points."""
    offline, live = [each.sch for each in points], [each.live_hit_ratio for each in points]
    return Correlation(
        pearson=pearson(offline, live), spearman=spearman(offline, live), n_point=len(points)
    )


def _lines(points: Sequence[Point], found: Correlation) -> Iterator[str]:
    yield f"{'model':<28} {'slots':>6} {'share':>6} {'rho':>6} {'SCH':>7} {'live':>7}  policy"
    for each in points:
        yield (
            f"{each.model[:28]:<28} {each.n_slots:>6} {each.share:>6.1%} {each.rho:>6.2f} "
            f"{each.sch:>7.1%} {each.live_hit_ratio:>7.1%}  {each.policy}"
        )
    met = "reached" if found.spearman >= TARGET else "missed"
    yield (
        f"{found.n_point} points: Spearman {found.spearman:.3f} ({TARGET} {met}), "
        f"Pearson {found.pearson:.3f}"
    )


@click.command()
@click.argument("traces", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object last.")
def main(traces: tuple[Path, ...], as_json: bool) -> None:
    """Correlate offline SCH with the live hit rates of the runs that made TRACES."""
    points = [point_of(path) for path in traces]
    found = correlation(points)
    for line in _lines(points, found):
        click.echo(line)
    if as_json:
        click.echo(json.dumps({"points": [asdict(each) for each in points]} | asdict(found)))


if __name__ == "__main__":
    main()
