"""Forecasts: what a header costs, where it is placed, what comes of both; and the bench."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgeroute.config import RunParams
from edgeroute.offload.trace import Trace, TraceMeta, make_step
from edgeroute.offload.trace_records import Pools, PoolState, StepPaging
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools.bench import forecast as bench
from edgeroute.tools.bench.report import BenchParams
from edgeroute.tools.forecast.forecast import Ask, decode_bytes_s, forecast, rate, read_s
from edgeroute.tools.forecast.hits import hit_model, hit_ratio, with_pace
from edgeroute.tools.forecast.model_cost import ModelCost, PageShape, Work, model_cost
from edgeroute.tools.forecast.placement import Placement, from_plan, place, streamed_units
from edgeroute.tools.forecast.records import HitModel, Range, Speeds, StoragePoint
from edgeroute.tools.forecast.storage import smooth
from edgeroute.tools.forecast.stream import Stage, stream_s
from edgeroute.tools.forecast.tiny_model import N_EMBD, N_VOCAB, TinyShape, write_tiny

PAGES = PageShape(n_expert=16, n_expert_used=2, n_layer=4, page_bytes=3_000_000, n_parts=3)
SPEEDS = Speeds(
    name="test", memory_bytes=1 << 34, available_bytes=1 << 33,
    weight_bytes_s={"Q4_K": 1e10, "Q4_K:plain": 5e9, "Q4_K:slots": 4e9, "Q4_K:experts": 8e9},
    prefill_flops_s={"Q4_K": 1e11}, kv_bytes_s=1e10, graph_s=1e-4, layer_s=1e-5,
    paged_layer_s=1e-4, storage=(StoragePoint(read_bytes=1_000_000, depth=1, bytes_s=1e9),),
    threads=2, expert_layer_s=2e-5, origins={"storage": "measured"},
)  # fmt: skip


def _work(n_bytes: int) -> Work:
    return Work(row_bytes={"Q4_K": {2048: n_bytes}}, flops={"Q4_K": 4.0 * n_bytes})


def _cost(pages: PageShape | None = None) -> ModelCost:
    layers = tuple(_work(10_000_000) for _ in range(4))
    return ModelCost(
        name="m", arch="qwen3moe" if pages else "llama", n_layer=4, n_vocab=1000,
        dense=_work(40_000_000), head=_work(20_000_000), router=Work(),
        experts=_work(24_000_000) if pages else Work(), layer_work=(*layers, _work(20_000_000)),
        kv_cell_bytes=1000, attended_cell_bytes=2000, pages=pages,
    )  # fmt: skip


def _placed(**fields: object) -> Placement:
    base = Placement(verdict="FITS", pages=None, budget_bytes=100, needed_bytes=90,
                     smallest_bytes=50)  # fmt: skip
    return dataclasses.replace(base, **fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A dense model and one with experts."""
    folder, found = tmp_path_factory.mktemp("forecast"), {}
    for experts in (False, True):
        found[experts] = folder / f"{experts}.gguf"
        write_tiny(TinyShape(n_layer=3, experts=experts), found[experts])
    return found


# cost


@pytest.mark.parametrize("experts", [False, True])
def test_cost_adds_up_to_the_matrices_of_the_file(
    tiny_files: dict[bool, Path], experts: bool
) -> None:
    with GGUFFile.open(tiny_files[experts]) as file:
        cost = model_cost(file)
        used = {
            name: info.nbytes for name, info in file.tensors.items()
            if not name.endswith("norm.weight") and name != "token_embd.weight"
        }  # fmt: skip
    dense = cost.dense.total_bytes + cost.router.total_bytes
    chosen = sum(n for name, n in used.items() if "_exps" in name) // 64 * 8
    assert cost.head.row_bytes == {"Q8_0": {N_EMBD: N_EMBD * N_VOCAB // 32 * 34}}
    assert dense + cost.head.total_bytes == sum(
        n for name, n in used.items() if "_exps" not in name
    )
    assert cost.experts.total_bytes == chosen
    assert cost.head.flops["Q8_0"] == 2 * N_EMBD * N_VOCAB
    assert sum(work.total_bytes for work in cost.layer_work) == (
        cost.dense.total_bytes + cost.head.total_bytes
    )
    assert (cost.pages is not None) == experts
    assert cost.attended_cell_bytes == 2 * cost.kv_cell_bytes  # 4 heads share 2 of the keys


def test_cost_needs_no_weights(tiny_files: dict[bool, Path], tmp_path: Path) -> None:
    """What `plan` fetches of a remote file is the header alone."""
    with GGUFFile.open(tiny_files[True]) as file:
        whole, begin = model_cost(file), file.data_offset
    cut = tmp_path / "cut.gguf"
    size = tiny_files[True].stat().st_size
    with cut.open("wb") as out:
        out.write(tiny_files[True].read_bytes()[:begin])
        out.truncate(size)
    with GGUFFile.open(cut) as file:
        assert dataclasses.replace(model_cost(file), name=whole.name) == whole


# placement


def test_placement_fits_pages_and_refuses(tiny_files: dict[bool, Path]) -> None:
    with GGUFFile.open(tiny_files[True]) as file:
        params = RunParams(n_ctx=64, n_ubatch=64)
        whole = place(file, dataclasses.replace(params, memory=1 << 40))
        least = place(file, dataclasses.replace(params, memory=1 << 20))
    assert (whole.verdict, whole.pages) == ("FITS", None)
    assert least.verdict == "REFUSED"
    assert least.smallest_bytes <= whole.needed_bytes


@pytest.mark.parametrize(("n", "drafting", "expected"), [
    (2, True, (2, 3)), (4, True, (0, 1, 2, 3)), (2, False, (1, 3)), (5, False, (0, 1, 2, 3, 4)),
])  # fmt: skip
def test_streamed_units_are_those_of_the_engine(
    n: int, drafting: bool, expected: tuple[int, ...]
) -> None:
    assert streamed_units(n, 4, drafting=drafting) == expected


def test_a_plan_of_the_plan_command_is_taken() -> None:
    streaming = SimpleNamespace(fits=True, n_streamed=2)
    plan = SimpleNamespace(
        budget_bytes=10, memory=SimpleNamespace(total_bytes=20), is_resident=False, fits=True,
        smallest_budget_bytes=5, slots=None, paging=None, streaming=streaming,
        hparams=SimpleNamespace(n_layer=4), params=RunParams(speculate="off"),
    )  # fmt: skip
    placed = from_plan(plan)
    assert (placed.verdict, placed.pages, placed.streamed) == ("PAGES", "layers", (1, 3))


# speeds


def test_missing_speeds_are_taken_from_the_likeliest_others() -> None:
    rates = {"Q4_K": 3.0, "Q4_K:slots": 2.0, "Q8_0": 7.0}
    assert rate(rates, "Q4_K", "experts") == 2.0
    assert rate(rates, "Q8_0", "plain") == 7.0
    assert rate(rates, "Q5_K", "dense") == 3.0


def test_short_rows_are_slower_by_what_a_row_costs() -> None:
    """10 ns a row and 1 ns per 100 bytes of it, a byte per value."""
    rates = {"Q8_0": 2048 / 30.48e-9, "Q8_0/512": 512 / 15.12e-9, "Q4_K": 3e9, "Q4_K/512": 4e9}
    for n_in in (512, 576, 1536, 2048):
        took_s = n_in / decode_bytes_s(rates, "Q8_0", "dense", n_in)
        assert took_s == pytest.approx(10e-9 + n_in * 1e-11)
    assert decode_bytes_s(rates, "Q8_0", "dense", 64) == rates["Q8_0/512"]
    assert decode_bytes_s(rates, "Q8_0", "dense", 8960) == rates["Q8_0"]
    assert decode_bytes_s(rates, "Q8_0", "slots", 576) == rates["Q8_0"]  # measured for dense only
    assert 3e9 < decode_bytes_s(rates, "Q4_K", "dense", 1024) < 4e9  # noise: no further than both


def test_reads_between_measured_ones_are_interpolated() -> None:
    points = [
        StoragePoint(read_bytes=size, depth=depth, bytes_s=float(speed))
        for size, depth, speed in ((100, 1, 10), (100, 4, 30), (10_000, 1, 30), (10_000, 4, 50))
    ]
    assert read_s(points, 100, 1) == pytest.approx(10.0)
    assert read_s(points, 1000, 2) == pytest.approx(2000 / 30)
    assert read_s(points, 1, 1) == pytest.approx(1 / 10)
    assert read_s(points, 10_000, 9) == pytest.approx(90_000 / 50)
    assert read_s(points, 100, 0) == 0.0


def test_smoothing_finds_the_costs_of_a_batch() -> None:
    def seconds(size: int, depth: int) -> float:
        return 1e-3 + depth * 2e-4 + size * depth / 1e9

    cells = {(size, depth): seconds(size, depth) for size in (10**5, 10**6) for depth in (1, 4, 9)}
    for point in smooth(cells):
        wanted = seconds(point.read_bytes, point.depth)
        assert point.read_bytes * point.depth / point.bytes_s == pytest.approx(wanted, rel=1e-6)


# streaming


@pytest.mark.parametrize(("read", "compute", "overlap", "expected"), [
    (2.0, 1.0, 1.0, 8.0),  # the disk never rests
    (1.0, 2.0, 1.0, 8.0),  # the processor never rests
    (2.0, 1.0, 0.0, 12.0),  # nothing hides
    (0.0, 1.0, 0.5, 4.0),
])  # fmt: skip
def test_a_pass_takes_what_the_slower_takes(
    read: float, compute: float, overlap: float, expected: float
) -> None:
    stages = [Stage(read_s=read, n_bytes=1, compute_s=compute)] * 4
    assert stream_s(stages, overlap) == pytest.approx(expected)


def test_a_ring_of_one_room_cannot_hide_reads() -> None:
    """The room is free only when its layer was computed."""
    stages = [Stage(read_s=2.0, n_bytes=1, compute_s=1.0)] * 3
    assert stream_s(stages, 1.0, n_rooms=1) == pytest.approx(9.0)


# forecasts


def test_resident_models_take_bytes_over_bandwidth_and_fixed_costs() -> None:
    found = forecast(_placed(), _cost(), SPEEDS, None, Ask(n_past=0))
    assert found.decode_tok_s is not None
    assert 1 / found.decode_tok_s.likely == pytest.approx(60e6 / 1e10 + 1e-4 + 4e-5)
    assert sum(found.parts.values()) == pytest.approx(1 / found.decode_tok_s.likely)
    assert found.decode_tok_s.low < found.decode_tok_s.likely < found.decode_tok_s.high
    assert found.read_bytes_token == 0


def test_paged_experts_wait_for_what_they_miss() -> None:
    placed = _placed(verdict="PAGES", pages="experts", n_slots=32, n_pages=64)
    hits = HitModel(curve=((0.5, 0.75),), origin="measured")
    found = forecast(placed, _cost(PAGES), SPEEDS, hits, Ask(n_past=0))
    assert found.hit_ratio == Range(low=0.75, likely=0.75, high=0.75)
    assert found.read_bytes_token == pytest.approx(2 * 3e6)
    assert found.parts["reads"] == pytest.approx(2 * 3e6 / 1e9)
    assert found.parts["experts"] == pytest.approx(24e6 / 4e9)
    more = dataclasses.replace(SPEEDS, overlap_ratio=1.0)
    quicker = forecast(placed, _cost(PAGES), more, hits, Ask(n_past=0))
    assert quicker.parts["reads"] < found.parts["reads"]


def test_more_memory_is_never_slower() -> None:
    hits = hit_model(None, PAGES, "qwen3moe")
    speeds = []
    for n_slots in range(2, 65, 6):
        placed = _placed(verdict="PAGES", pages="experts", n_slots=n_slots, n_pages=64)
        found = forecast(placed, _cost(PAGES), SPEEDS, hits).decode_tok_s
        assert found is not None
        speeds.append(found.likely)
    assert speeds == sorted(speeds)


def test_streamed_layers_are_computed_in_the_files_layout() -> None:
    placed = _placed(verdict="PAGES", pages="layers", streamed=(1, 2))
    found = forecast(placed, _cost(), SPEEDS, None, Ask(n_past=0))
    assert found.parts["dense"] == pytest.approx(40e6 / 5e9)
    assert found.read_bytes_token == 20_000_000
    assert found.parts["reads"] == pytest.approx(20e6 / 1e9)


def test_what_does_not_fit_is_refused() -> None:
    found = forecast(_placed(verdict="REFUSED"), _cost(), SPEEDS)
    assert (found.verdict, found.decode_tok_s, found.smallest_bytes) == ("REFUSED", None, 50)


def test_joules_are_watts_over_speed() -> None:
    found = forecast(_placed(), _cost(), dataclasses.replace(SPEEDS, active_watts=10.0))
    assert found.joules_token is not None and found.decode_tok_s is not None
    assert found.joules_token.likely == pytest.approx(10 / found.decode_tok_s.likely)


def test_unknown_types_are_said() -> None:
    cost = dataclasses.replace(
        _cost(), head=Work(row_bytes={"IQ4_XS": {2048: 10}}, flops={"IQ4_XS": 20.0})
    )
    assert "IQ4_XS" in forecast(_placed(), cost, SPEEDS).notes[0]


# hits


def _trace(rng: np.random.Generator, n_steps: int = 60) -> Trace:
    meta = TraceMeta(model="m", n_layer=4, n_expert=16, n_expert_used=2, page_bytes=10,
                     layers=(0, 1, 2, 3))  # fmt: skip
    steps = [
        make_step(meta, False, [(il, rng.permutation(16)[:2]) for il in range(4)])
        for _ in range(n_steps)
    ]
    return Trace(meta=meta, steps=tuple(steps))


def test_uniform_routing_hits_by_chance() -> None:
    model = hit_model(_trace(np.random.default_rng(1), 400), PAGES)
    assert model.origin == "measured"
    assert hit_ratio(model, 0.5).likely == pytest.approx(0.5, abs=0.06)


def test_a_constant_route_hits_always_above_one_cycle() -> None:
    trace = _trace(np.random.default_rng(2), 1)
    trace = dataclasses.replace(trace, steps=trace.steps * 60)
    model = hit_model(trace, PAGES)
    assert hit_ratio(model, PAGES.cycle_pages / PAGES.n_pages).likely == 1.0


def _with_costs(trace: Trace, seconds: float) -> Trace:
    """Add what a run with half of all experts in memory noted beside its steps."""
    n_steps = len(trace.steps)
    pool = PoolState(layers=(0, 1, 2, 3), n_slots=32, policy="lru", page_bytes=10, slot_bytes=10)
    steps = [
        StepPaging(step=i, seconds=seconds if i >= n_steps // 3 else 9.0, stall_s=0.0, hits=4,
                   late=0, misses=4, demand_bytes=40, prefetch_bytes=0)
        for i in range(n_steps)
    ]  # fmt: skip
    pools = Pools(step=0, begins=True, pools=(pool,), group_bytes=1, n_ahead=1)
    return dataclasses.replace(trace, live=(pools,), paging=tuple(steps))


def test_a_run_on_this_machine_sets_the_level_of_what_is_missing() -> None:
    """Its tokens took a second beyond the arithmetic; with fewer missing, less of that."""
    trace = _trace(np.random.default_rng(1), 60)
    plain = hit_model(trace, PAGES)
    paced = with_pace(plain, _with_costs(trace, 1.0), PAGES)
    assert with_pace(plain, trace, PAGES) == plain  # a trace without costs says nothing
    ratio = hit_ratio(plain, 0.5).likely
    assert paced.pace == (pytest.approx(ratio), pytest.approx(1.0))

    def decoded(hits: HitModel, n_slots: int, speeds: Speeds = SPEEDS) -> float:
        placed = _placed(verdict="PAGES", pages="experts", n_slots=n_slots, n_pages=64)
        found = forecast(placed, _cost(PAGES), speeds, hits).decode_tok_s
        assert found is not None
        return found.likely

    assert 1 / decoded(paced, 32) == pytest.approx(1.0, rel=0.01)
    assert 1.0 > 1 / decoded(paced, 48) > 1 / decoded(plain, 48)
    elsewhere = dataclasses.replace(SPEEDS, origins={"storage": "stated"})
    assert decoded(paced, 32, elsewhere) == decoded(plain, 32, elsewhere)


def test_a_trace_of_another_model_is_refused() -> None:
    with pytest.raises(UsageError, match="of a model with 4 layers"):
        hit_model(_trace(np.random.default_rng(3)), dataclasses.replace(PAGES, n_expert=8))


def test_stated_curves_rise_and_lie_above_uniform_routing() -> None:
    shape = PageShape(n_expert=128, n_expert_used=8, n_layer=48, page_bytes=1, n_parts=3)
    for arch in ("qwen3moe", "qwen2moe", "new"):
        model = hit_model(None, shape, arch)
        found = [hit_ratio(model, share / 100) for share in range(0, 101, 5)]
        assert [each.likely for each in found] == sorted(each.likely for each in found)
        assert all(each.low <= each.likely <= each.high for each in found)
        assert all(each.likely >= i / 20 for i, each in enumerate(found) if i > 2)
        assert found[-1].low == 1.0
    qwen3, qwen2 = (hit_model(None, shape, arch) for arch in ("qwen3moe", "qwen2moe"))
    assert hit_ratio(qwen3, 0.231).likely == pytest.approx(0.76, abs=0.01)
    assert hit_ratio(qwen2, 0.231).likely < 0.6


# the bench


def _cell(measured: float) -> bench.Cell:
    return bench.Cell(
        model="m.gguf", placed=_placed(), forecast=forecast(_placed(), _cost(), SPEEDS),
        measured=(measured, measured, measured), hit_ratio=None, read_bytes_token=0.0,
    )  # fmt: skip


def test_the_report_counts_cells_within_the_tolerance() -> None:
    said = _cell(1.0).forecast.decode_tok_s
    assert said is not None
    cells = [_cell(said.likely)] * 10 + [_cell(2 * said.likely)] * 2
    params = BenchParams(path=Path("m.gguf"), name="m", threads=1)
    wanted = bench.ForecastParams(models=(Path("m.gguf"),))
    assert bench.make_report(params, wanted, cells).met
    report = bench.make_report(params, wanted, [*cells[1:], _cell(0.5 * said.likely)])
    assert not report.met
    assert report.results[0]["ratio"] == pytest.approx(1.0)
