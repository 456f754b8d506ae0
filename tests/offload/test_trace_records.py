"""Everything in a trace's file beside steps: kept, cut, continued, refused when wrong."""

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeroute.offload.counters import LayerCounters
from edgeroute.offload.trace import (
    MAGIC,
    Counted,
    Mark,
    Pools,
    PoolState,
    Record,
    StepPaging,
    Trace,
    TraceError,
    TraceMeta,
    TraceReader,
    TraceRecorder,
    TraceStep,
    TraceWriter,
    iter_trace,
    make_step,
    read_trace,
    sequences,
)
from edgeroute.runtime.errors import EdgerouteError, UsageError

META = TraceMeta(
    model="tiny", n_layer=5, n_expert=60, n_expert_used=2, page_bytes=9, layers=(1, 2, 4)
)


def new_step(number: int) -> TraceStep:
    ids = [number % 60, 59 - number % 59]
    return make_step(META, number % 3 == 0, [(il, ids) for il in META.layers])


def new_paging(step: int, **changes: Any) -> StepPaging:
    same = {"seconds": 0.5, "stall_s": 0.25, "hits": 3, "late": 0, "misses": 2, "demand_bytes": 18}
    return StepPaging(step=step, prefetch_bytes=0, **{**same, **changes})


def new_pools(step: int, begins: bool = True, n_slots: int = 7) -> Pools:
    pools = (
        PoolState(layers=(1, 4), n_slots=n_slots, policy="lru", page_bytes=9, slot_bytes=64),
        PoolState(layers=(2,), n_slots=4, policy="lfru", page_bytes=8, slot_bytes=64),
    )
    return Pools(step=step, begins=begins, pools=pools, group_bytes=100, n_ahead=2)


def new_counted(step: int) -> Counted:
    pools = []
    for n_layer, page_bytes in ((5, 9), (3, 8)):
        counters = LayerCounters(n_layer, page_bytes)
        counters.hits[2], counters.evictions[1], counters.demand_bytes[0] = 1, 2, 1 << 40
        counters.stalled(1, 0.125)
        pools.append((counters.snapshot(), LayerCounters(n_layer, page_bytes).snapshot()))
    return Counted(step=step, pools=tuple(pools))


RECORDS: list[Record] = [
    new_pools(0), Mark(step=0, label="code"),
    new_step(0), new_paging(0, turns=(0, 2), most=2048), new_step(1), new_paging(1),
    new_pools(2, begins=False, n_slots=5), Mark(step=2, label=""), Mark(step=2, label="größer"),
    new_step(2), new_paging(2, is_broken=True), new_counted(3),
]  # fmt: skip


def write(path: Path, records: Sequence[Record]) -> None:
    with TraceWriter(path, META) as writer:
        for record in records:
            writer.append(record)


def plain(record: Record) -> object:
    """What can be compared with ==."""
    if isinstance(record, TraceStep):
        return record.prefill, record.layers, record.sizes, record.flat.tolist()
    return record


def same(ours: Sequence[Record], theirs: Sequence[Record]) -> bool:
    return [plain(one) for one in ours] == [plain(one) for one in theirs]


def test_all_records_are_read_as_written_and_in_order(tmp_path: Path) -> None:
    write(tmp_path / "t", RECORDS)
    assert same(list(iter_trace(tmp_path / "t")), RECORDS)
    trace = read_trace(tmp_path / "t")
    assert same(list(trace.records()), RECORDS)
    assert [mark.label for mark in trace.marks] == ["code", "", "größer"]
    assert [record.begins for record in trace.pools] == [True, False]
    assert len(trace.counted) == 1 and not trace.truncated


def test_paging_of_a_step_costs_fifty_bytes(tmp_path: Path) -> None:
    write(tmp_path / "t", [new_step(1)])
    before = (tmp_path / "t").stat().st_size
    write(tmp_path / "t", [new_step(1), new_paging(1)])
    assert (tmp_path / "t").stat().st_size - before == 18 + 44


def test_a_file_cut_anywhere_gives_its_whole_records_and_can_be_continued(tmp_path: Path) -> None:
    path, cut = tmp_path / "t", tmp_path / "cut"
    write(path, RECORDS)
    with TraceReader(path) as reader:
        ends = [reader.end, *(reader.end for _ in reader)]
    data = path.read_bytes()
    assert ends[-1] == len(data)
    for n_bytes in range(ends[0], len(data) + 1, 7):
        cut.write_bytes(data[:n_bytes])
        n_whole = sum(end <= n_bytes for end in ends) - 1
        with TraceReader(cut) as reader:
            assert same(list(reader), RECORDS[:n_whole])
            assert reader.truncated == (n_bytes not in ends)
            assert list(reader) == []
        if n_bytes % 5 == 0:
            more = [new_step(5), Mark(step=0, label="x")]
            write(cut, more)
            assert same(list(iter_trace(cut))[:n_whole], RECORDS[:n_whole])
            n_steps = sum(isinstance(record, TraceStep) for record in RECORDS[:n_whole])
            assert list(iter_trace(cut))[-1] == Mark(step=n_steps + 1, label="x")


def _old(path: Path) -> bytes:
    """A file of version 1, with two steps."""
    header = json.dumps(asdict(META)).encode()
    steps = b"".join(
        struct.pack("<BBHII", 0xE5, 2, 3, 10, 2) + bytes([n, n + 1] * 3) for n in range(2)
    )
    data = struct.pack("<8sII", MAGIC, 1, len(header)) + header + steps
    path.write_bytes(data)
    return data


def test_files_of_version_1_are_read_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "t"
    old = _old(path)
    trace = read_trace(path)
    assert [step.flat.tolist() for step in trace.steps] == [[0, 1] * 3, [1, 2] * 3]
    assert not trace.live and not trace.paging and not trace.truncated
    write(path, [new_pools(2), new_step(4), new_paging(2)])
    again = read_trace(path)
    assert len(again.steps) == 3 and again.paging[0].step == 2 and again.pools[0].step == 2
    data = path.read_bytes()
    assert data[: len(old)] == old[:8] + struct.pack("<I", 2) + old[12:]
    path.write_bytes(data[:8] + struct.pack("<I", 1) + data[12:])
    with pytest.raises(TraceError, match="version 1"):
        read_trace(path)


def test_sequences_are_cut_at_marks() -> None:
    steps = tuple(new_step(number) for number in range(7))
    paging = tuple(new_paging(number, hits=number) for number in range(7))
    marks = (Mark(step=2, label="a"), Mark(step=2, label="none"), Mark(step=4, label="b"),
             Mark(step=7, label="end"))  # fmt: skip
    trace = Trace(meta=META, steps=steps, marks=marks, paging=paging)
    found = list(sequences(trace))
    assert [(label, len(part.steps)) for label, part in found] == [("", 2), ("none", 2), ("b", 3)]
    assert [record.step for record in found[2][1].paging] == [0, 1, 2]
    assert [record.hits for record in found[2][1].paging] == [4, 5, 6]
    assert found[1][1].steps == steps[2:4]
    ((label, whole),) = sequences(Trace(meta=META, steps=steps))
    assert label == "" and whole.steps == steps
    assert list(sequences(Trace(meta=META, steps=()))) == []


def test_marks_need_a_file_and_a_short_label(tmp_path: Path) -> None:
    recorder = TraceRecorder(META)
    assert not recorder.writes
    with pytest.raises(UsageError, match="trace=FILE"):
        recorder.mark("code")
    with TraceWriter(tmp_path / "t", META) as writer:
        recorder = TraceRecorder(META, writer=writer)
        recorder.mark("code")
        with pytest.raises(TraceError, match="the limit is 256"):
            recorder.mark("x" * 257)
        with pytest.raises(TraceError, match="is no text"):
            recorder.mark("\udcff")
    assert [mark.label for mark in read_trace(tmp_path / "t").marks] == ["code"]


# wrong files


def _head(kind: int, payload: bytes, flags: int = 0, number: int = 0) -> bytes:
    return struct.pack("<BBHI", kind, flags, number, len(payload)) + payload


def _json(kind: int, found: object) -> bytes:
    return _head(kind, json.dumps(found).encode())


_POOL = {"layers": [1, 2, 4], "n_slots": 7, "policy": "lru", "page_bytes": 1, "slot_bytes": 1}


def _pools(**changes: object) -> bytes:
    fields = {"begins": True, "group_bytes": 1, "n_ahead": 0, "pools": [_POOL]}
    return _json(0xE8, {**fields, **changes})


def _pool(**changes: object) -> bytes:
    return _pools(pools=[{**_POOL, **changes}])


def _kind(**changes: object) -> dict[str, object]:
    fields = asdict(new_counted(0).pools[0][0].layers[0])
    return {**{name: [0] * 5 for name in fields}, **changes}


def _counted(**changes: object) -> bytes:
    return _pools() + _json(0xE9, [[_kind(), _kind(**changes)]])


_STEP = struct.pack("<BBHII", 0xE5, 2, 3, 10, 2) + bytes(6)
_COST = struct.pack("<ffIIIQQ", 1, 0, 0, 0, 0, 0, 0)


def _cost(seconds: float = 1.0, tail: bytes = b"", **how: int) -> bytes:
    cost = struct.pack("<ff", seconds, 0) + _COST[8:] + tail
    return _STEP + _head(0xE7, cost, **{"number": 3, **how})


WRONG = {
    "unknown kind": _head(0xEA, b""),
    "flags of a mark": _head(0xE6, b"", flags=1),
    "number too large": _head(0xE6, b"", number=4),
    "label too long": _head(0xE6, b"x" * 1025),
    "label too long in characters": _head(0xE6, b"x" * 257),
    "label no text": _head(0xE6, b"\xff"),
    "huge mark": struct.pack("<BBHI", 0xE6, 0, 0, 1 << 31),
    "huge pools": struct.pack("<BBHI", 0xE8, 0, 0, 1 << 31),
    "huge counters": struct.pack("<BBHI", 0xE9, 0, 0, 1 << 31),
    "paging of nothing": _head(0xE7, _COST, number=3),
    "paging twice": _cost() + _head(0xE7, _COST, number=3),
    "paging of other layers": _cost(number=2),
    "paging flags": _cost(flags=2),
    "paging short": _STEP + _head(0xE7, _COST[:-1], number=3),
    "seconds nan": _cost(float("nan")),
    "seconds negative": _cost(-1.0),
    "seconds infinite": _cost(float("inf")),
    "turns long": _cost(tail=struct.pack("<I", 1) + b"\x80\0"),
    "turns none": _cost(tail=struct.pack("<I", 1) + b"\0"),
    "turns beyond": _cost(tail=struct.pack("<I", 1) + b"\x10"),
    "turns of nothing": _cost(tail=struct.pack("<I", 0) + b"\x80"),
    "pools no json": _head(0xE8, b"{"),
    "pools deep": _head(0xE8, b"[" * 100000),
    "pools a list": _json(0xE8, []),
    "pools more": _pools(more=1),
    "pools begins": _pools(begins=1),
    "pools text": _pools(pools="x"),
    "pools none": _pools(pools=[]),
    "pools twice": _pools(pools=[_POOL, _POOL]),
    "pools groups": _pools(group_bytes=0),
    "pools ahead": _pools(n_ahead=-1),
    "pool layers": _pool(layers=[1, 2]),
    "pool layer unknown": _pool(layers=[1, 2, 3]),
    "pool layer text": _pool(layers=["1", 2, 4]),
    "pool no layers": _pool(layers=[]),
    "pool slots": _pool(n_slots=0),
    "pool slots beyond": _pool(n_slots=181),
    "pool slots huge": _pool(n_slots=1 << 70),
    "pool slots true": _pool(n_slots=True),
    "pool policy": _pool(policy=""),
    "pool policy number": _pool(policy=5),
    "counters first": _json(0xE9, []),
    "counters of other pools": _pools() + _json(0xE9, []),
    "counters a mapping": _pools() + _json(0xE9, {}),
    "counters of one kind": _pools() + _json(0xE9, [[_kind()]]),
    "counters more": _counted(more=1),
    "counters short": _counted(hits=[0] * 4),
    "counters no list": _counted(hits=0),
    "counters negative": _counted(hits=[0, 0, -1, 0, 0]),
    "counters float": _counted(hits=[0, 0, 0.5, 0, 0]),
    "counters huge": _counted(hits=[0, 0, 1 << 63, 0, 0]),
    "stall nan": _counted(stall_s=[0, 0, float("nan"), 0, 0]),
    "stall text": _counted(stall_s=[0, 0, "0", 0, 0]),
}


def _file(tail: bytes) -> bytes:
    header = json.dumps(asdict(META)).encode()
    return struct.pack("<8sII", MAGIC, 2, len(header)) + header + tail


@pytest.mark.parametrize("name", WRONG)
def test_wrong_records_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "t").write_bytes(_file(WRONG[name]))
    with pytest.raises(TraceError):
        read_trace(tmp_path / "t")


def test_what_the_wrong_ones_are_made_of_is_right(tmp_path: Path) -> None:
    good = _pools() + _cost(tail=struct.pack("<I", 1) + b"\x80") + _counted() + _head(0xE6, b"x")
    (tmp_path / "t").write_bytes(_file(good))
    trace = read_trace(tmp_path / "t")
    assert (len(trace.steps), len(trace.live), len(trace.marks)) == (1, 3, 1)


_kinds = st.sampled_from([0xE5, 0xE6, 0xE7, 0xE8, 0xE9])
_any = st.builds(
    lambda kind, flags, number, payload: _head(kind, payload, flags, number),
    _kinds, st.integers(0, 3), st.integers(0, 4), st.binary(max_size=50),
)  # fmt: skip


@given(st.lists(st.one_of(_any, st.just(_STEP), st.just(_pools())), max_size=5))
@settings(max_examples=150, deadline=None)
def test_any_records_are_read_or_refused(tmp_path_factory, tail) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("any") / "t"
    path.write_bytes(_file(b"".join(tail)))
    try:
        read_trace(path)
    except EdgerouteError as error:
        assert isinstance(error, TraceError)


def test_a_model_with_more_pages_than_any_pool_is_refused() -> None:
    with pytest.raises(TraceError, match="n_expert"):
        TraceMeta(model="m", n_layer=4096, n_expert=65536, n_expert_used=1, page_bytes=0,
                  layers=(4095,))  # fmt: skip
