"""The benchmark of prefetch: pairs by budget and predictor, on made-up lives."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgeroute.commands.bench_paged import prefetch as command
from edgeroute.runtime.errors import UsageError
from edgeroute.tools import synth
from edgeroute.tools.bench import prefetch as bench
from edgeroute.tools.bench.experts_engines import COUNTERS, Life, Phase
from edgeroute.tools.bench.pairs import Series
from edgeroute.tools.bench.prefetch import PrefetchParams, settings_of
from edgeroute.tools.bench.report import BenchParams


def life(speed: float, moved: float = 1e6, state: str = "on") -> Life:
    counted = dict.fromkeys(COUNTERS, 0.0) | {"demand_bytes": 10 * moved}
    phase = Phase(n_tokens=10, seconds=10 / speed, read_bytes=0, experts=counted)
    return Life(first=phase, decode=phase, prefill=phase, after=phase, pager={"prefetch": state})


def series(*speeds: float) -> Series:
    return Series(values=speeds, others=(0.0,) * len(speeds))


def test_pairs_of_one_round_are_compared() -> None:
    """A machine that slows down between rounds changes both of a pair."""
    speeds = {"off": series(10.0, 20.0, 40.0), "gate": series(11.0, 18.0, 41.0)}
    lives = {"off": [life(1.0, 2e6)] * 3, "gate": [life(1.0, 3e6), life(1.0, 3e6, "off")] * 2}
    [found] = settings_of("2GiB", speeds, lives)
    assert (found.limit, found.predictor) == ("2GiB", "gate")
    assert found.time_ratio == pytest.approx(40 / 41)
    assert (found.low, found.high) == (pytest.approx(10 / 11), pytest.approx(20 / 18))
    assert found.bytes_ratio == pytest.approx(1.5)
    assert found.states == ("on", "off", "on", "off")


@pytest.fixture
def model(tmp_path: Path) -> BenchParams:
    path = tmp_path / "moe.gguf"
    synth.make("olmoe", path)
    return BenchParams(path=path, name="moe.gguf", threads=1, reps=2)


@pytest.fixture
def lived(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Runs that are not made; the settings of each."""
    asked: list[dict[str, Any]] = []

    def limited(self: Any, name: str, engine: Any, settings: dict[str, Any]) -> Any:
        def run() -> float:
            asked.append({"limit": self.limit_bytes, "name": name, **settings})
            speed = {"off": 10.0, "gate": 9.0}.get(name, 10.1)
            self.lives.setdefault(name, []).append(life(speed))
            return speed

        return run

    monkeypatch.setattr(bench._Bench, "_limited", limited)
    yield asked


def test_every_budget_meets_every_predictor(
    model: BenchParams, lived: list[dict[str, Any]]
) -> None:
    wanted = PrefetchParams(limits=("2MB", "50%"), predictors=("auto", "gate"))
    report = bench.run(model, lambda line: None, wanted)
    assert len(lived) == 2 * 2 * 4
    size = model.path.stat().st_size
    for one in lived:
        assert one["prefetch"] == one["name"].removesuffix(" again") and "levers" not in one
        assert one["memory"] == int(0.92 * one["limit"])
    assert {one["limit"] for one in lived} == {2_000_000, size // 2}
    met = {criterion.what: criterion.met for criterion in report.criteria}
    assert met == {
        "2MB, auto: time per token over that without": True,
        "2MB, gate: time per token over that without": False,
        "50%, auto: time per token over that without": True,
        "50%, gate: time per token over that without": False,
    }
    assert [row[:2] for row in report.rows] == [
        ("2MB", "off again"), ("2MB", "auto"), ("2MB", "gate"),
        ("50%", "off again"), ("50%", "auto"), ("50%", "gate"),
    ]  # fmt: skip
    assert report.rows[2][4] == "1.111 [1.111 to 1.111]"


def test_what_has_nothing_to_read_ahead_is_refused(
    model: BenchParams, lived: list[dict[str, Any]], tiny_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    wanted = PrefetchParams(limits=("2MB",))
    with pytest.raises(UsageError, match="has no experts, so nothing is read ahead"):
        bench.run(replace(model, path=tiny_path), lambda line: None, wanted)
    monkeypatch.setattr(f"{__name__}.life", lambda speed: replace(_plain(), pager={}))
    with pytest.raises(UsageError, match=r"fits 2MB; lower --limit"):
        bench.run(model, lambda line: None, wanted)


def _plain() -> Life:
    phase = Phase(n_tokens=10, seconds=1.0, read_bytes=0)
    return Life(first=phase, decode=phase, prefill=phase, after=phase)


def test_a_limit_must_be_given() -> None:
    done = CliRunner().invoke(command, ["--model", "x"])
    assert done.exit_code == 2 and "--limit" in done.output
