"""The table, demands and JSON of the depth benchmark."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from edgeroute.skippers.plan import DepthPlan
from edgeroute.tools.bench.report import BenchParams, Criterion, Report, plain
from edgeroute.tools.depth_probe import Score
from edgeroute.tools.depth_speed import Speed

MIN_POINTS: Final = 6
MIN_TIME_SHARE: Final = 0.85
"""Of the compute that a plan leaves out, what its wall-clock gain must be at least."""
CONTROLS: Final = ("shortgpt", "uniform", "random")
KINDS: Final = ("prose", "code")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One plan: its and its rivals' scores by name and kind of text, and its speed."""

    plan: DepthPlan
    scores: Mapping[str, Mapping[str, Score]]
    speed: Speed

    @property
    def time_share(self) -> float:
        """Share of the compute left out that came back as time."""
        return self.speed.saved / (1.0 - self.plan.compute) if self.plan.compute < 1 else 0.0

    def kl(self, name: str, kind: str) -> float:
        """Return a rival's mean divergence; `random` is the mean over its seeds."""
        found = [each[kind].mean_kl for each in self._of(name)]
        return sum(found) / len(found)

    def figures(self, name: str, kind: str) -> dict[str, float | None]:
        """Return a rival's figures, means over the seeds of chance."""
        scores = [each[kind] for each in self._of(name)]
        n = len(scores)
        return {
            "kl": plain(sum(s.mean_kl for s in scores) / n),
            "kl_error": plain(sum(s.kl_error for s in scores) / n),
            "ppl_ratio": plain(sum(s.ppl_ratio for s in scores) / n),
            "top1": plain(sum(s.top1 for s in scores) / n),
        }

    @property
    def rivals(self) -> list[str]:
        """Names of all that was measured, chance once."""
        return list(dict.fromkeys(name.split("-")[0] for name in self.scores))

    def _of(self, name: str) -> list[Mapping[str, Score]]:
        return [scores for each, scores in self.scores.items() if each.split("-")[0] == name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """All points, the fullest first, scored on `n_tokens` of each kind of text."""

    params: BenchParams
    points: Sequence[Point]
    n_tokens: int


def make_report(found: Found) -> Report:
    """Put plans beside their controls and demands."""
    columns = (
        "plan", "text", "compute", "KL", "ppl x", "same top",
        *(f"{name} KL (ppl x)" for name in (*CONTROLS, "skipped")), "speed", "of compute",
    )  # fmt: skip
    return Report(
        bench="depth", params=found.params, columns=columns, rows=tuple(_rows(found)),
        results=[_result(point) for point in found.points],
        criteria=tuple(_criteria(found.points)), notes=tuple(_notes(found)),
    )  # fmt: skip


def _rows(found: Found) -> Iterator[tuple[str, ...]]:
    for point in found.points:
        for kind in KINDS:
            mine = point.scores["policy"][kind]
            first = kind == KINDS[0]
            low, high = point.speed.quartiles
            yield (
                point.plan.name if first else "", kind,
                f"{point.plan.compute:.1%}" if first else "",
                f"{mine.mean_kl:.3f} ± {mine.kl_error:.3f}", f"{mine.ppl_ratio:.3f}",
                f"{mine.top1:.1%}",
                *(_other(point, name, kind) for name in (*CONTROLS, "skipped")),
                f"x{point.speed.gain:.3f} [{low:.3f} to {high:.3f}]" if first else "",
                f"{point.time_share:.2f}" if first else "",
            )  # fmt: skip


def _other(point: Point, name: str, kind: str) -> str:
    if name not in point.rivals:
        return "-"
    found = point.figures(name, kind)
    return f"{found['kl']:.3f} ({found['ppl_ratio']:.2f})"


def _criteria(points: Sequence[Point]) -> Iterator[Criterion]:
    yield Criterion(what="speed points", value=len(points), limit=MIN_POINTS)
    for name in CONTROLS:
        won = [point.kl("policy", kind) <= point.kl(name, kind)
               for point in points for kind in KINDS]  # fmt: skip
        yield Criterion(what=f"share of points that diverge no more than {name}",
                        value=sum(won) / len(won), limit=1.0)  # fmt: skip
    fitted = [point for point in points if "skipped" in point.rivals]
    if fitted:
        won = [point.kl("policy", kind) < point.kl("skipped", kind)
               for point in fitted for kind in KINDS]  # fmt: skip
        yield Criterion(what="share of points that stand-ins improve on skipping the same",
                        value=sum(won) / len(won), limit=1.0)  # fmt: skip
    least = min(point.time_share for point in points)
    yield Criterion(what="least share of the compute left out that came back as time",
                    value=least, limit=MIN_TIME_SHARE)  # fmt: skip


def _notes(found: Found) -> Iterator[str]:
    yield (
        f"{found.n_tokens} tokens of prose and as many of code that calibration never sees; "
        f"full model's perplexity {_ppl(found, 'prose'):.2f} and {_ppl(found, 'code'):.2f}"
    )
    yield (
        "controls leave out whole layers and part of one, never compute less than the plan, and "
        "spare the layers that calibration spares; random is the mean of 3 draws"
    )


def _ppl(found: Found, kind: str) -> float:
    return found.points[0].scores["policy"][kind].ppl_full


def _result(point: Point) -> dict[str, object]:
    plan, (low, high) = point.plan, point.speed.quartiles
    return {
        "plan": plan.name, "key": plan.key, "compute": plain(plan.compute),
        "promised_kl": plan.kl, "speed": plain(point.speed.gain),
        "speed_quartiles": [plain(low), plain(high)],
        "time_share_of_compute": plain(point.time_share),
        "texts": {kind: {name: point.figures(name, kind) for name in point.rivals}
                  for kind in KINDS},
    }  # fmt: skip
