"""The replay benchmark: made-up routes that repeat as models' do, and a report with demands."""

from pathlib import Path

import pytest

from edgeroute.offload.replay import replay
from edgeroute.offload.trace import TraceMeta, TraceWriter, make_step
from edgeroute.runtime.errors import UsageError
from edgeroute.tools.bench.replay import ReplayParams, bench, drifting_trace
from edgeroute.tools.bench.report import BenchParams

PARAMS = BenchParams(path=Path("model.gguf"), name="m", threads=1)
SMALL = ReplayParams(n_event=400, n_layer=4, n_expert=16, n_expert_used=2)


def test_the_report_says_what_replays_took_and_hit() -> None:
    said: list[str] = []
    report = bench(PARAMS, SMALL, said.append)
    trace = drifting_trace(SMALL)
    assert len(said) == 1 + len(SMALL.policies) == 1 + len(report.rows)
    for row, found in zip(report.rows, report.results, strict=True):
        assert found["n_event"] == 400 and found["n_request"] == 800
        assert found["hit_ratio"] == replay(trace, row[0], 16).hit_ratio
    assert [criterion.limit for criterion in report.criteria] == [10.0, 30.0]
    assert report.to_dict()["bench"] == "replay"


def test_made_up_routes_have_locality_but_no_fixed_set() -> None:
    trace = drifting_trace(SMALL)
    assert 0.3 < replay(trace, "lru", 16).hit_ratio < replay(trace, "belady", 16).hit_ratio < 1
    with pytest.raises(UsageError, match="at least one token"):
        drifting_trace(ReplayParams(n_event=3))


def test_a_recorded_file_is_replayed(tmp_path: Path) -> None:
    meta = TraceMeta(model="m", n_layer=1, n_expert=8, n_expert_used=1, page_bytes=1, layers=(0,))
    path = tmp_path / "t"
    with TraceWriter(path, meta) as writer:
        writer.append(make_step(meta, True, [(0, [1, 2])]))
        with pytest.raises(UsageError, match="no decode step"):
            bench(PARAMS, ReplayParams(trace=path), lambda text: None)
        writer.append(make_step(meta, False, [(0, [3])]))
    report = bench(PARAMS, ReplayParams(trace=path, policies=("lru",)), lambda text: None)
    assert report.results[0]["n_event"] == 1 and len(report.criteria) == 1
