"""Prefetch against none, in every setting asked for: budget by predictor, in alternating pairs.

Each run is a process of its own under the kernel's limit, the file dropped from the page cache.
Prefetch is as users have it, `levers` at its default: what loses switches itself off, so it may
cost little in any setting, which is the demand.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import format_bytes
from edgeroute.tools.bench import pairs
from edgeroute.tools.bench.experts import Bench, ExpertsParams
from edgeroute.tools.bench.experts_ceiling import geometry
from edgeroute.tools.bench.experts_engines import MIN_TOKENS, Life
from edgeroute.tools.bench.report import BenchParams, Criterion, Report, plain, spread

OFF: Final = "off"
AGAIN: Final = "off again"
"""The same once more in each round: what its pairs scatter is no gain or loss of anything."""
PREDICTORS: Final = ("auto", "gate", "eam", "frequency")
"""What is tried by default; `auto` is gate, on while it is measured to pay."""
TARGET_TIME: Final = 1.02
"""Seconds per token with prefetch over those without, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchParams:
    """What is tried.

    Attributes:
        limits: of the kernel, each with a budget of 0.92 of it; as in ExpertsParams.
        predictors: values of the setting `prefetch`.
        n_prompt, max_s: as in ExpertsParams.
    """

    limits: tuple[str, ...]
    predictors: tuple[str, ...] = PREDICTORS
    n_prompt: int = 8
    max_s: float = 8.0


class _Bench(Bench):
    """The runs under one limit."""

    def __init__(self, params: BenchParams, limit: str, wanted: PrefetchParams) -> None:
        super().__init__(params, ExpertsParams(limit=limit, n_prompt=wanted.n_prompt,
                                               max_s=wanted.max_s, peer=False))  # fmt: skip
        self.plan = replace(self.plan, n_after=MIN_TOKENS)  # only decoding is compared
        self._names = (OFF, AGAIN, *dict.fromkeys(wanted.predictors))

    def runners(self) -> dict[str, pairs.Runner]:
        """Decoding without prefetch, twice, and by each predictor."""
        return {
            name: self._limited(name, self.pager, self.settings(
                memory=self.budget_bytes, prefetch=OFF if name == AGAIN else name
            ))
            for name in self._names
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One budget and predictor against no prefetch.

    Attributes:
        time_ratio: seconds per token over those without: median over pairs of the same round,
            and `low` and `high` their range.
        bytes_ratio: bytes read per token over those without.
        states: what prefetch was in the end, run by run.
    """

    limit: str
    predictor: str
    time_ratio: float
    low: float
    high: float
    bytes_ratio: float
    states: tuple[str, ...]


def settings_of(
    limit: str, speeds: Mapping[str, pairs.Series], lives: Mapping[str, Sequence[Life]]
) -> list[Setting]:
    """Compare every predictor with `off`, pair by pair."""
    off, before = speeds[OFF].values, _moved_bytes(lives[OFF])
    found = []
    for name, series in speeds.items():
        if name == OFF:
            continue
        ratios = [without / on for on, without in zip(series.values, off, strict=True)]
        found.append(Setting(
            limit=limit, predictor=name, time_ratio=statistics.median(ratios), low=min(ratios),
            high=max(ratios), bytes_ratio=_moved_bytes(lives[name]) / before if before else 1.0,
            states=tuple(str(life.pager.get("prefetch")) for life in lives[name]),
        ))  # fmt: skip
    return found


def _moved_bytes(lives: Sequence[Life]) -> float:
    return statistics.median(life.decode.moved_bytes / life.decode.n_tokens for life in lives)


def run(params: BenchParams, progress: pairs.Progress, wanted: PrefetchParams) -> Report:
    """Measure every setting.

    Raises:
        UsageError: the model has no experts, all of them fit a limit, or no control group can be
            made here.
        EdgerouteError: a run failed.
    """
    if not geometry(params.path).expert_bytes:
        raise UsageError(f"{params.name} has no experts, so nothing is read ahead; see `edgeroute "
                         "bench layers` for dense models")  # fmt: skip
    params = replace(params, warmup=0)
    rows, results, found = [], [], list[Setting]()
    for limit in wanted.limits:
        bench = _Bench(params, limit, wanted)
        progress(f"limit {format_bytes(bench.limit_bytes)}, "
                 f"budget {format_bytes(bench.budget_bytes)}")  # fmt: skip
        speeds = pairs.alternate(bench.runners(), params.plan, progress)
        if not bench.lives[OFF][-1].pager:
            raise UsageError(f"all of {params.name} fits {limit}; lower --limit, so that experts "
                             "are paged")  # fmt: skip
        here = settings_of(limit, speeds, bench.lives)
        found += here
        rows += [_row(each, speeds) for each in here]
        results += [
            asdict(each) | {"tok_s": speeds[each.predictor].to_dict(),
                            "off_tok_s": speeds[OFF].to_dict()}
            for each in here
        ]  # fmt: skip
    return Report(
        bench="prefetch", params=params, rows=tuple(rows), results=results,
        columns=("limit", "prefetch", "off, tok/s", "on, tok/s", "time on/off, pairs",
                 "bytes on/off", "in the end", "runs"),
        criteria=tuple(
            Criterion(what=f"{each.limit}, {each.predictor}: time per token over that without",
                      value=plain(each.time_ratio) or 0.0, limit=TARGET_TIME, at_most=True)
            for each in found
            if each.predictor != AGAIN
        ),
        notes=("levers at their default: a predictor that is asked for by name is tried first, "
               "and on only while it pays",),
    )  # fmt: skip


def _row(setting: Setting, speeds: Mapping[str, pairs.Series]) -> tuple[str, ...]:
    off, on = speeds[OFF], speeds[setting.predictor]
    states = ", ".join(f"{state} {setting.states.count(state)}x"
                       for state in dict.fromkeys(setting.states))  # fmt: skip
    noisy = on.n_noisy + off.n_noisy
    return (
        setting.limit, setting.predictor, spread(off, 2), spread(on, 2),
        f"{setting.time_ratio:.3f} [{setting.low:.3f} to {setting.high:.3f}]",
        f"{setting.bytes_ratio:.2f}", states, f"{noisy} of {2 * len(on.values)} noisy",
    )  # fmt: skip
