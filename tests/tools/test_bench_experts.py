"""The experts benchmark: its ceilings and demands on made-up lives, and one real small run."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgeroute.commands import bench as command
from edgeroute.offload.replay import replay
from edgeroute.offload.trace import TraceMeta, TraceWriter, make_step, read_trace
from edgeroute.runtime.errors import EdgerouteError, UsageError
from edgeroute.runtime.units import GIB, MIB
from edgeroute.tools.bench import experts, experts_python, experts_report
from edgeroute.tools.bench.experts import ExpertsParams
from edgeroute.tools.bench.experts_ceiling import Ceiling, Geometry, Replayed, geometry, replayed
from edgeroute.tools.bench.experts_engines import COUNTERS, Life, LifePlan, Phase, counters
from edgeroute.tools.bench.experts_report import Found
from edgeroute.tools.bench.limit import MemoryLimit
from edgeroute.tools.bench.pairs import Series
from edgeroute.tools.bench.report import BenchParams, Criterion, Report
from edgeroute.tools.synth_large import SHAPES, write_large


@pytest.fixture(scope="module")
def moe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 experts of which two are used, in two layers."""
    path = tmp_path_factory.mktemp("moe") / "moe.gguf"
    spec = replace(
        SHAPES["qwen3-30b-a3b"], n_layer=2, n_embd=256, n_ff_exp=256, n_head=4, n_head_kv=2,
        n_embd_head=64, n_expert=32, n_expert_used=2, n_vocab=1000, weight_type="Q4_0",
    )  # fmt: skip
    write_large(spec, path)
    return path


@pytest.fixture
def _groups() -> Iterator[None]:
    try:
        MemoryLimit(64 * MIB).close()
    except UsageError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield


# ceilings


def test_ceilings_add_or_overlap() -> None:
    found = Ceiling(moved_bytes=3e9, store_bytes_s=1e9, resident_s=2.0)
    assert found.serial_s == 5.0 and found.overlapped_s == 3.0
    assert replace(found, moved_bytes=1e9).overlapped_s == 2.0


def test_geometry_counts_experts_once_and_a_tokens_share(moe_path: Path) -> None:
    found = geometry(moe_path)
    one = 3 * 256 * 256 * 18 // 32
    assert found.expert_bytes == 2 * 32 * one
    assert found.token_bytes == 2 * 2 * one
    assert found.file_bytes == moe_path.stat().st_size
    assert found.fixed_bytes + found.expert_bytes == found.file_bytes


def test_a_dense_model_has_no_experts(tiny_path: Path) -> None:
    found = geometry(tiny_path)
    assert found.expert_bytes == found.token_bytes == 0


def test_a_trace_is_replayed_through_all_policies(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    meta = TraceMeta(model="m", n_layer=2, n_expert=8, n_expert_used=2, page_bytes=100,
                     layers=(0, 1))  # fmt: skip
    rng = np.random.default_rng(1)
    with TraceWriter(path, meta) as writer:
        for _ in range(40):
            chosen = [(il, rng.choice(8, 2, replace=False)) for il in (0, 1)]
            writer.append(make_step(meta, False, chosen))
    found = replayed(path, 6)
    ratios = found.hit_ratios
    assert {"lru", "lfu", "belady"} <= set(ratios)
    assert ratios["belady"] == max(ratios.values()) >= ratios[found.best] >= ratios["lru"]
    lru = replay(read_trace(path), "lru", 6).decode.total
    assert found.lru_bytes == 100 * lru.misses > 0


# what was asked for


def test_limits_in_bytes_and_in_shares_of_the_file() -> None:
    assert ExpertsParams(limit="2GiB").limit_bytes(5) == 2 * GIB
    assert ExpertsParams(limit="40%").limit_bytes(1000) == 400
    assert ExpertsParams(limit="1GiB").budget_bytes(1000) == 920
    assert ExpertsParams(limit="1GiB", memory="1MiB").budget_bytes(1000) == MIB
    for wrong in ("0%", "101%", "x%", "-4%"):
        with pytest.raises(UsageError, match="no share of a file"):
            ExpertsParams(limit=wrong).limit_bytes(1000)


def test_counters_are_summed_over_decode_and_prefill() -> None:
    one = dict.fromkeys(COUNTERS, 1)
    pager = {"policy": "lru", "decode": one, "prefill": dict.fromkeys(COUNTERS, 2)}
    assert counters(pager)["misses"] == 3
    assert counters(pager, ("decode",))["misses"] == 1
    assert counters({}) == {}


# the report


def phase(n_tokens: int, seconds: float, demand: float = 0.0, stall_s: float = 0.0) -> Phase:
    made = dict.fromkeys(COUNTERS, 0.0) | {"demand_bytes": demand, "stall_s": stall_s}
    return Phase(n_tokens=n_tokens, seconds=seconds, read_bytes=int(demand), experts=made)


def life(speed: float) -> Life:
    """Decodes at `speed`, moving 1e8 bytes a token of which the pager waits a tenth of a second."""
    return Life(
        first=phase(1, 3.0, 5e8), decode=phase(10, 10 / speed, 1e9, 1.0),
        prefill=phase(100, 4.0, 2e9), after=phase(5, 5 / speed, 5e8, 0.5),
        pager={"policy": "lfu", "n_slots": 6,
               "decode": dict.fromkeys(COUNTERS, 0) | {"demand_bytes": 11.0}},
    )  # fmt: skip


def found(**changes: Any) -> Found:
    series = {"edgeroute": 4.0, "llama.cpp": 0.2, "resident": 10.0}
    made = Found(
        params=BenchParams(path=Path("m.gguf"), name="m", threads=1, reps=1),
        limit_bytes=GIB, budget_bytes=GIB, target=15.0,
        geometry=Geometry(file_bytes=3_000_000_000, expert_bytes=2_500_000_000,
                          token_bytes=500_000_000),
        decode={name: Series(values=(speed,), others=(0.0,)) for name, speed in series.items()},
        lives={name: [life(speed)] for name, speed in series.items()},
        store_bytes_s=1e9, peaks={"edgeroute": [5]}, notes=("a note",),
        replayed=Replayed(n_slots=6, best="lru", hit_ratios={"lru": 0.5, "lfu": 0.47,
                                                            "belady": 0.6}, lru_bytes=10),
        traced=life(4.0),
    )  # fmt: skip
    return replace(made, **changes)


def criteria(report: Report) -> dict[str, Criterion]:
    return {criterion.what: criterion for criterion in report.criteria}


def test_the_demands_are_computed_from_the_phases() -> None:
    report = experts_report.make_report(found())
    values = {what: criterion.value for what, criterion in criteria(report).items()}
    assert values["decode over llama.cpp's mmap"] == pytest.approx(20)
    # 1e8 bytes at 1e9 bytes/s, and 0.1 s computed as in the resident run; it took 0.25 s.
    assert values["decode over the serial ceiling"] == pytest.approx(0.8)
    # 2e7 bytes and 0.04 s computed per token of the prompt, so computing is the longer.
    assert values["prefill over the overlapped ceiling"] == pytest.approx(1.0)
    assert values["bytes that prefill reads over all experts once"] == pytest.approx(0.8)
    assert values["cold first token over the time to read what it needs"] == pytest.approx(3.0)
    assert values["bytes that decoding read over those of LRU by demand alone"] == 1.1
    policy = next(what for what in values if "best online policy (lru)" in what)
    assert "(lfu)" in policy and values[policy] == pytest.approx(0.03)
    assert not criteria(report)[policy].met
    line = json.dumps(report.to_dict())
    assert json.loads(line)["results"][0]["replay"]["hit_ratios"]["belady"] == 0.6
    assert any("belady 60.0%, lru 50.0%, lfu 47.0%" in note for note in report.notes)


def test_without_a_resident_run_the_pagers_own_split_counts() -> None:
    full = found()
    lives = {name: full.lives[name] for name in ("edgeroute", "llama.cpp")}
    report = experts_report.make_report(replace(full, lives=lives))
    # 0.25 s less the 0.1 s in which it waited.
    assert criteria(report)["decode over the serial ceiling"].value == pytest.approx(1.0)


def test_without_peer_and_trace_there_is_less_to_say() -> None:
    full = found()
    lives = {name: full.lives[name] for name in ("edgeroute", "resident")}
    report = experts_report.make_report(replace(full, lives=lives, replayed=None, traced=None))
    assert not [what for what in criteria(report) if "mmap" in what or "policy" in what]
    assert len(report.columns) == len(report.rows[0]) == 3


def test_overlap_and_python_are_reported_where_they_were_measured() -> None:
    full = found()
    assert not any("computed while" in note for note in experts_report.make_report(full).notes)
    more = {"overlap": "on", "overlap_gain": 0.125, "overlap_s": 1.5}
    lives = [replace(life(4.0), pager=life(4.0).pager | more),
             replace(life(4.0), pager=life(4.0).pager | {"overlap": "off", "overlap_gain": None,
                                                         "overlap_s": 0.5})]  # fmt: skip
    report = experts_report.make_report(
        replace(full, lives=full.lives | {"edgeroute": lives}, python_us_per_layer=61.5)
    )
    [note] = [note for note in report.notes if "computed while" in note]
    assert "1.00 s per run" in note and "on, off" in note and "12.5%" in note
    python = criteria(report)["microseconds of Python per layer and token when all hit"]
    assert python.value == 61.5 and not python.met
    assert json.loads(json.dumps(report.to_dict()))["results"][0]["python_us_per_layer"] == 61.5


def test_python_is_timed_on_tokens_that_hit_only() -> None:
    assert 0 < experts_python.python_us_per_layer(60) < 1e6
    with pytest.raises(EdgerouteError, match="all of 1 tokens read experts"):
        experts_python.python_us_per_layer(1)


# runs


@pytest.mark.usefixtures("_groups")
def test_the_command_on_a_small_model(moe_path: Path) -> None:
    """Under a limit that holds everything: each phase of each engine, and one JSON line."""
    done = CliRunner().invoke(
        command.command,
        ["experts", "--model", str(moe_path), "--limit", "1GiB", "--reps", "1", "--tokens", "8",
         "--prompt", "24", "--threads", "1", "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    last = json.loads(done.stdout.splitlines()[-1])
    lives = last["results"][0]["lives"]
    for name in ("edgeroute", "llama.cpp", "resident"):
        (one,) = lives[name]
        assert one["first"]["n_tokens"] == 1 and one["prefill"]["n_tokens"] == 24, name
        # Ours arrive as text, so that parts of a character come together with the next token.
        assert 2 <= one["decode"]["n_tokens"] <= 8 and 2 <= one["after"]["n_tokens"] <= 4, name
        assert one["decode"]["tok_s"] > 0
    assert 0 < last["results"][0]["peak_bytes"]["llama.cpp"][0] <= GIB


class Glutton:
    """Takes more than it may."""

    def __init__(self, path: Path, settings: object) -> None:
        held = bytearray(256 * MIB)
        held[::4096] = b"x" * len(held[::4096])

    def live(self, plan: LifePlan) -> None:
        """Never reached."""

    def close(self) -> None:
        """Nothing to free."""


@pytest.mark.usefixtures("_groups")
def test_what_the_kernel_kills_is_called_that(moe_path: Path) -> None:
    params = BenchParams(path=moe_path, name="m", threads=1, reps=1, tokens=8)
    bench = experts.Bench(params, ExpertsParams(limit="96MiB", n_prompt=8))
    with pytest.raises(EdgerouteError, match=r"the kernel killed glutton.*96 MiB.*--limit"):
        bench._limited("glutton", Glutton, None)()
