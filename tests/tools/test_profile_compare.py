"""Two profiles side by side, and SCH against live hit rates."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgeroute.offload.eviction_cliff import CycleShape, cyclic_trace
from edgeroute.offload.replay import replay
from edgeroute.offload.trace import Mark, Pools, PoolState, StepPaging, TraceWriter, read_trace
from edgeroute.runtime.errors import UsageError
from edgeroute.tools.profile import compare as module
from edgeroute.tools.profile.analyse import About, analyse
from edgeroute.tools.profile.compare import compare, read_side
from edgeroute.tools.profile.correlate import correlation, main, pearson, point_of, spearman


def silent(phase: str, n_done: int, n_total: int) -> None:
    assert 0 < n_done <= n_total


def record(path: Path, keep: float, n_slots: int, n_token: int = 40, n_expert: int = 12) -> Path:
    """Write a trace of tokens that use each expert again with probability `keep`, with the hits
    that a run with so many slots would have had."""
    shape = CycleShape(n_layer=3, n_expert=n_expert, n_expert_used=2)
    trace = cyclic_trace(shape, n_token, keep)
    hits = replay(trace, "lfru", n_slots).decode.total
    state = PoolState(layers=trace.meta.layers, n_slots=n_slots, policy="lfru", page_bytes=8,
                      slot_bytes=8)  # fmt: skip
    with TraceWriter(path, trace.meta) as writer:
        writer.append(Pools(step=0, begins=True, pools=(state,), group_bytes=1, n_ahead=1))
        for i, step in enumerate(trace.steps):
            if i % 20 == 0:
                writer.append(Mark(step=i, label=f"part {i}"))
            writer.append(step)
            first = i == 0
            writer.append(StepPaging(
                step=i, seconds=0.1, stall_s=0, hits=hits.hits if first else 0, late=0,
                misses=hits.misses if first else 0, demand_bytes=8, prefetch_bytes=0,
            ))  # fmt: skip
    return path


def test_correlations_are_those_of_the_textbook() -> None:
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert pearson([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert pearson([1, 2, 3], [5, 5, 5]) == 0
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    # Anscombe's first set; and ranks with a tie share their mean.
    x = [10, 8, 13, 9, 11, 14, 6, 4, 12, 7, 5]
    y = [8.04, 6.95, 7.58, 8.81, 8.33, 9.96, 7.24, 4.26, 10.84, 4.82, 5.68]
    assert pearson(x, y) == pytest.approx(0.81642, abs=1e-5)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.94868, abs=1e-5)
    for bad in (([1], [1]), ([1, 2], [1, 2, 3])):
        with pytest.raises(UsageError, match="two or more pairs"):
            pearson(*bad)


def test_sch_ranks_runs_as_their_live_hit_rates_do(tmp_path: Path) -> None:
    paths = [
        record(tmp_path / f"{keep}-{n}.trace", keep, n) for keep in (0.2, 0.9) for n in (7, 12, 24)
    ]
    points = [point_of(path) for path in paths]
    assert [each.rho for each in points] == pytest.approx([7 / 6, 2, 4] * 2)
    # What was recorded, read back.
    assert points[0].live_hit_ratio == replay(read_trace(paths[0]), "lfru", 7).hit_ratio
    assert correlation(points).spearman >= 0.8
    done = CliRunner().invoke(main, [*map(str, paths), "--json"])
    assert done.exit_code == 0 and "6 points: Spearman" in done.output
    assert json.loads(done.output.splitlines()[-1])["n_point"] == 6


def test_a_trace_without_its_run_cannot_be_correlated(tmp_path: Path) -> None:
    trace = cyclic_trace(CycleShape(n_layer=2, n_expert=4, n_expert_used=1), 5, 0.5)
    with TraceWriter(tmp_path / "a.trace", trace.meta) as writer:
        for step in trace.steps:
            writer.append(step)
    with pytest.raises(UsageError, match="nothing of its live run"):
        point_of(tmp_path / "a.trace")


def test_a_trace_compares_with_its_own_profile_as_equal(tmp_path: Path) -> None:
    path = record(tmp_path / "a.trace", 0.6, 12)
    facts = analyse(path, About(), silent).to_dict()
    (tmp_path / "a.json").write_text(f"a table before\n{json.dumps(facts)}\n")
    found = compare(read_side(path, silent), read_side(tmp_path / "a.json", silent))
    assert all(each.hit_ratios[0] == each.hit_ratios[1] for each in found.hits)
    assert {each.policy for each in found.hits} == {"lru", "lfu", "lfru", "belady"}
    assert found.load_pearson == pytest.approx(1) and found.load_spearman == pytest.approx(1)
    assert found.srp[16][0] == found.srp[16][1] > 0
    json.dumps(found.to_dict(), allow_nan=False)
    assert [title for title, _ in found.sections()] == ["Compared", "Loads"]


def test_models_of_unlike_shape_have_no_loads_in_common(tmp_path: Path) -> None:
    paths = record(tmp_path / "a.trace", 0.9, 12), record(tmp_path / "b.trace", 0.1, 12, 40, 20)
    found = compare(*(read_side(path, silent) for path in paths))
    assert found.load_pearson is None and found.n_page == (36, 60)
    lru = next(each for each in found.hits if (each.policy, each.share) == ("lru", 0.5))
    assert lru.n_slots == (18, 30) and lru.hit_ratios[0] > lru.hit_ratios[1]
    assert [title for title, _ in found.sections()] == ["Compared"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "neither a trace nor a profile"),
        (b"\xff\xff", "neither a trace nor a profile"),
        (b"[" * 100_000, "neither a trace nor a profile"),
        (b"[1, 2]", "holds no object"),
        (b'{"format": "x"}', "no profile"),
        (b'{"format": "edgeroute-profile", "version": 1}', "lacks what a comparison needs"),
        (b'{"format": "edgeroute-profile", "version": 99}', "version 99"),
        (b'{"format": "edgeroute-profile", "version": 1, "hits": 3}', "hits"),
    ],
)
def test_a_malformed_profile_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UsageError, match=message):
        read_side(tmp_path / "a.json", silent)


def test_a_huge_or_missing_profile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        read_side(tmp_path / "none", silent)
    monkeypatch.setattr(module, "MAX_PROFILE_BYTES", 5)
    (tmp_path / "a.json").write_text("{      }")
    with pytest.raises(UsageError, match="a profile has at most 5 B"):
        read_side(tmp_path / "a.json", silent)
