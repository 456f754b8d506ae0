"""The benchmark of adapters: its verdicts on made-up figures, its shape on a tiny model.

No speed is asserted anywhere.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgeroute.runtime.errors import AdapterFileError, EdgerouteError, UsageError
from edgeroute.tools.bench import adapters, adapters_report
from edgeroute.tools.bench.adapters import N_SPARE, PARTS, AdaptersParams, make_adapters
from edgeroute.tools.bench.adapters_engines import Adapted, AdapterPeer, Routed, TheirAdapted
from edgeroute.tools.bench.adapters_report import Found, Pairs, Switches
from edgeroute.tools.bench.pairs import Series
from edgeroute.tools.bench.peer import PeerParams
from edgeroute.tools.bench.report import BenchParams, Report

WANTED = AdaptersParams(n_mixed=2, n_prompt=24, n_named=20, n_routed=5)


def quiet(line: str) -> None:
    """Drop a line of progress."""


@pytest.fixture
def params(tiny_path: Path) -> BenchParams:
    return BenchParams(path=tiny_path, name="tiny", threads=1, reps=1, tokens=150, warmup=0,
                       pause_s=0.0)  # fmt: skip


@pytest.fixture(scope="module")
def files(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_adapters(tiny_path, tmp_path_factory.mktemp("made"), WANTED)


# the report


def series(*values: float) -> Series:
    return Series(values=values, others=(0.0,) * len(values))


def ratio(kept: float) -> Pairs:
    return Pairs(ratio=series(kept), base=series(100.0), changed=series(100.0 * kept))


def switches(**seconds: float) -> Switches:
    """`memory`, `disk`: until the first token of ours, of which 20 ms are no switch."""
    ttft = {
        "edgeroute: in memory": series(seconds["memory"]),
        "edgeroute: from disk": series(seconds["disk"]),
        "edgeroute: no change": series(0.020),
        "disk": series(0.003),
    }
    waits = {name: series(0.001) for name in ttft if name != "disk"}
    return Switches(n_bytes=3_000_000, ttft=ttft, waits=waits, disk=ttft["disk"], cache="dropped")


@pytest.fixture
def found(params: BenchParams) -> Found:
    return Found(
        params=params, rank=8, n_mixed=8, n_prompt=512, n_named=1000, max_cost=0.25,
        decode={"edgeroute": ratio(0.8), "llama.cpp": ratio(0.78)},
        mixed={"edgeroute": ratio(0.9)}, prefill={"edgeroute": ratio(0.95)},
        switches=switches(memory=0.024, disk=0.032), routing=(0.001, 0.0015, 0.009),
    )  # fmt: skip


def verdicts(report: Report) -> list[bool]:
    return [criterion.met for criterion in report.criteria]


def test_every_demand_is_met_by_good_figures(found: Found) -> None:
    report = adapters_report.make_report(found)
    assert len(report.criteria) == 6 and report.met
    cost, over_peer, mixed, in_memory, from_disk, route = report.criteria
    assert cost.value == pytest.approx(0.2) and over_peer.value == pytest.approx(-0.02)
    assert mixed.value == 0.9
    assert in_memory.value == pytest.approx(4.0), "the delay counts where it is more than the wait"
    assert from_disk.value == pytest.approx(12.0) and from_disk.limit == pytest.approx(13.0)
    assert route.value == pytest.approx(1.5)
    assert {row[0].partition(":")[0] for row in report.rows} >= {"edgeroute", "llama.cpp"}
    assert json.dumps(report.to_dict())


def test_each_demand_can_be_missed(found: Found) -> None:
    bad = (
        (0, replace(found, max_cost=0.19)),
        (1, replace(found, decode=dict(found.decode) | {"llama.cpp": ratio(0.81)})),
        (2, replace(found, mixed={"edgeroute": ratio(0.84)})),
        (3, replace(found, switches=switches(memory=0.0251, disk=0.032))),
        (4, replace(found, switches=switches(memory=0.024, disk=0.0331))),
        (5, replace(found, routing=(0.0021,))),
    )
    for at, each in bad:
        assert [i for i, met in enumerate(verdicts(adapters_report.make_report(each))) if not met] \
            == [at]  # fmt: skip


def test_parts_left_out_make_no_demands(found: Found) -> None:
    one = replace(found, decode={}, mixed={}, prefill={}, switches=None)
    report = adapters_report.make_report(one)
    assert len(report.criteria) == len(report.rows) == len(report.results) == 1


@pytest.mark.parametrize("wrong", [{"parts": ()}, {"parts": ("decode", "x")}, {"n_mixed": 1},
                                   {"n_prompt": 1}, {"n_named": 9}])  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        AdaptersParams(**wrong)  # type: ignore[arg-type]


# the engines


def test_our_engine_runs_with_and_without_an_adapter(tiny_path: Path, files: list[Path]) -> None:
    settings = {"threads": 1, "n_ctx": 256, "n_kv": 512, "max_batch": 2, "adapters": files,
                "adapter_slots": 2, "adapter_state": "off"}  # fmt: skip
    engine = Adapted(tiny_path, settings)  # type: ignore[arg-type]
    try:
        prompt = engine.text(8)
        first, second = files[0].stem, files[1].stem
        assert engine.switch(prompt, None, True).wait_s == 0.0
        cold = engine.switch(prompt, first, False)
        assert 0 < cold.wait_s <= cold.ttft_s
        with pytest.raises(EdgerouteError, match=r"in memory: True, not False"):
            engine.switch(prompt, first, False)
        assert engine.decode(prompt, 8, first) > 0 and engine.prefill(prompt, None) > 0
        assert engine.together([prompt, prompt], 100, [first, second]) > 0
    finally:
        engine.close()


def test_the_peer_applies_what_it_is_told(tiny_path: Path, files: list[Path]) -> None:
    params = PeerParams(n_ctx=128, threads=1)
    with AdapterPeer(tiny_path, params) as peer:
        plain = peer.decode([5, 6, 7], 0)
        adapter = peer.load(files[0])
        peer.use(adapter)
        peer.clear()
        assert (peer.decode([5, 6, 7], 0) != plain).any()
        peer.use(None)
        peer.clear()
        assert (peer.decode([5, 6, 7], 0) == plain).all()
        peer.unload(adapter)
        with pytest.raises(AdapterFileError, match="cannot load the adapter"):
            peer.load(tiny_path)


def test_the_peers_switches_take_time(tiny_path: Path, files: list[Path]) -> None:
    engine = TheirAdapted(tiny_path, PeerParams(n_ctx=128, threads=1), files[:2])
    try:
        for found in (engine.switch([5, 6], 1), engine.load_and_switch([5, 6], files[2])):
            assert 0 < found.wait_s < found.ttft_s
        assert engine.decode([5, 6], 4)[1] == 4
    finally:
        engine.close()


def test_routing_among_names_without_files(tiny_path: Path, files: list[Path]) -> None:
    engine = Routed(tiny_path, {"threads": 1, "n_ctx": 128, "adapters": files,  # type: ignore[typeddict-item]
                                "adapter_slots": 2, "adapter_state": "off"}, 30)  # fmt: skip
    try:
        assert len(engine._adapters.routing._router.names) == 30
        assert len(engine.choose(16, 4)) == 4
    finally:
        engine.close()


# the whole


def test_all_parts_on_a_tiny_model(params: BenchParams) -> None:
    lines: list[str] = []
    report = adapters.run(params, lines.append, WANTED)
    assert [result["part"] for result in report.results] == [
        "decode", "mixed", "prefill", "switch", "routing",
    ]  # fmt: skip
    assert len(report.criteria) == 6
    decode, switch = report.results[0], report.results[3]
    assert set(decode) == {"part", "unit", "edgeroute", "llama.cpp"}
    n_kinds = len({f"{e}: {k}" for e in ("edgeroute", "llama.cpp")
                   for k in ("in memory", "from disk", "no change")})  # fmt: skip
    wait = switch["wait"]
    assert isinstance(wait, dict) and len(wait) == n_kinds
    assert all(len(each["values"]) == adapters.SWITCH_RUNS for each in wait.values())
    assert f"making {2 + N_SPARE} adapters" in lines[0]
    json.dumps(report.to_dict())


def test_one_part_without_a_peer(params: BenchParams) -> None:
    assert set(PARTS) > {"decode"}
    wanted = replace(WANTED, parts=("decode",), peer=False)
    report = adapters.run(params, quiet, wanted)
    assert [result["part"] for result in report.results] == ["decode"]
    assert "llama.cpp" not in report.results[0] and len(report.criteria) == 1


def test_the_command_offers_every_part() -> None:
    from edgeroute.commands.bench_lossy import ADAPTER_PARTS

    assert ADAPTER_PARTS == PARTS
