"""Trace files: read as written, readable when cut off, refused when wrong."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeroute.offload.trace import (
    MAGIC,
    TraceError,
    TraceMeta,
    TraceRecorder,
    TraceStep,
    TraceWriter,
    make_step,
    pages_of,
    read_trace,
)
from edgeroute.runtime.errors import EdgerouteError


def new_meta(n_expert: int = 60) -> TraceMeta:
    return TraceMeta(
        model="tiny", n_layer=5, n_expert=n_expert, n_expert_used=2, page_bytes=9, layers=(1, 2, 4)
    )


def random_step(meta: TraceMeta, rng: random.Random, prefill: bool = False) -> TraceStep:
    """A decode step of one token, or a prefill whose last layer has fewer tokens."""
    n_tokens = rng.randint(2, 9) if prefill else 1
    chosen = [
        (il, [rng.randrange(meta.n_expert) for _ in range(2 * (1 if il == 4 else n_tokens))])
        for il in meta.layers
    ]
    return make_step(meta, prefill, chosen)


def write(path: Path, meta: TraceMeta, n_steps: int, seed: int = 0) -> list[TraceStep]:
    rng = random.Random(seed)
    steps = [random_step(meta, rng, prefill=number % 4 == 0) for number in range(n_steps)]
    with TraceWriter(path, meta) as writer:
        for step in steps:
            writer.append(step)
    return steps


def same(one: TraceStep, other: TraceStep) -> bool:
    equal = (one.prefill, one.layers, one.sizes) == (other.prefill, other.layers, other.sizes)
    return equal and one.flat.tolist() == other.flat.tolist()


@pytest.mark.parametrize("n_expert", [2, 256, 257, 65536])
def test_a_trace_is_read_as_written(tmp_path: Path, n_expert: int) -> None:
    meta = new_meta(n_expert)
    steps = write(tmp_path / "t", meta, 9)
    trace = read_trace(tmp_path / "t")
    assert trace.meta == meta and not trace.truncated
    assert all(map(same, trace.steps, steps)) and len(trace.steps) == 9
    assert trace.steps[0].prefill and not trace.steps[1].prefill
    assert [(il, ids.size) for il, ids in trace.steps[1].parts()] == [(1, 2), (2, 2), (4, 2)]


def test_one_decode_step_costs_its_ids_and_twelve_bytes(tmp_path: Path) -> None:
    meta = new_meta()
    rng = random.Random(1)
    with TraceWriter(tmp_path / "t", meta) as writer:
        before = (tmp_path / "t").stat().st_size
        writer.append(random_step(meta, rng))
    assert (tmp_path / "t").stat().st_size - before == 12 + 6


class _Full:
    """A file on a disk that takes half of the next write."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        return int(self._file.write(data[: len(data) // 2]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_a_step_that_a_full_disk_takes_half_of_leaves_no_trace(tmp_path: Path) -> None:
    meta, rng = new_meta(), random.Random(3)
    steps = [random_step(meta, rng) for _ in range(3)]
    with TraceWriter(tmp_path / "t", meta) as writer:
        writer.append(steps[0])
        whole = writer._file
        writer._file = _Full(whole)  # type: ignore[assignment]
        with pytest.raises(OSError, match="No space left"):
            writer.append(steps[1])
        writer._file = whole
        writer.append(steps[2])
    trace = read_trace(tmp_path / "t")
    assert not trace.truncated
    assert len(trace.steps) == 2 and all(map(same, trace.steps, (steps[0], steps[2])))


def test_a_file_cut_anywhere_gives_its_whole_steps_and_can_be_continued(tmp_path: Path) -> None:
    meta = new_meta(300)
    steps = write(tmp_path / "whole", meta, 5)
    data = (tmp_path / "whole").read_bytes()
    header = data.index(b"}") + 1
    lengths = []
    cut = tmp_path / "cut"
    for n_bytes in (*range(0, header, 16), *range(header, len(data) + 1)):
        cut.write_bytes(data[:n_bytes])
        if n_bytes < header:
            with pytest.raises(TraceError):
                read_trace(cut)
            continue
        trace = read_trace(cut)
        lengths.append(len(trace.steps))
        assert all(map(same, trace.steps, steps))
        if n_bytes % 17 == 0:
            with TraceWriter(cut, meta) as writer:
                writer.append(steps[0])
            again = read_trace(cut)
            assert not again.truncated and len(again.steps) == lengths[-1] + 1
            assert same(again.steps[-1], steps[0])
    assert lengths == sorted(lengths) and set(lengths) == {0, 1, 2, 3, 4, 5}
    assert not trace.truncated


def test_another_models_trace_is_not_continued(tmp_path: Path) -> None:
    write(tmp_path / "t", new_meta(), 2)
    before = (tmp_path / "t").read_bytes()
    with pytest.raises(TraceError, match="trace of 'tiny', set up otherwise"):
        TraceWriter(tmp_path / "t", new_meta(61))
    assert (tmp_path / "t").read_bytes() == before


def _header(**changes: object) -> bytes:
    fields: dict[str, object] = {
        "model": "m", "n_layer": 2, "n_expert": 4, "n_expert_used": 1, "page_bytes": 0,
        "layers": [0, 1],
    }  # fmt: skip
    text = json.dumps({**fields, **changes}).encode()
    return struct.pack("<8sII", MAGIC, 1, len(text)) + text


def _step(payload: bytes, flags: int = 0, n_layers: int = 2) -> bytes:
    return struct.pack("<BBHI", 0xE5, flags, n_layers, len(payload)) + payload


def _layer(layer: int, ids: bytes) -> bytes:
    return struct.pack("<HI", layer, len(ids)) + ids


WRONG = {
    "empty": b"",
    "magic": b"EDGETRAX" + _header()[8:],
    "version": struct.pack("<8sII", MAGIC, 9, 2) + b"{}",
    "header length": struct.pack("<8sII", MAGIC, 1, 1 << 31),
    "not json": struct.pack("<8sII", MAGIC, 1, 2) + b"{[",
    "deep json": struct.pack("<8sII", MAGIC, 1, 60000) + b"[" * 60000,
    "not utf-8": struct.pack("<8sII", MAGIC, 1, 2) + b"\xff\xff",
    "a list": struct.pack("<8sII", MAGIC, 1, 2) + b"[]",
    "missing field": struct.pack("<8sII", MAGIC, 1, 13) + b'{"n_layer":2}',
    "extra field": _header(more=1),
    "no layers": _header(layers=[]),
    "layers text": _header(layers="01"),
    "layer beyond": _header(layers=[0, 2]),
    "layer twice": _header(layers=[1, 1]),
    "layer true": _header(layers=[False, True]),
    "layer unhashable": _header(layers=[[], []]),
    "expert text": _header(n_expert="4"),
    "expert huge": _header(n_expert=1 << 40),
    "used more": _header(n_expert_used=5),
    "negative bytes": _header(page_bytes=-1),
    "float": _header(n_layer=2.0),
    "model number": _header(model=7),
    "no marker": _header() + b"\0" * 8,
    "flags": _header() + _step(b"\0" * 6, flags=4),
    "too many layers": _header() + _step(b"\0" * 6, n_layers=3),
    "huge step": _header() + struct.pack("<BBHI", 0xE5, 0, 2, 1 << 31),
    "uniform size": _header() + _step(struct.pack("<I", 2) + b"\0\0", flags=2),
    "uniform zero": _header() + _step(struct.pack("<I", 0), flags=2),
    "uniform layers": _header() + _step(struct.pack("<I", 1) + b"\0", flags=2, n_layers=1),
    "uniform short": _header() + _step(b"\0\0", flags=2),
    "expert beyond": _header() + _step(struct.pack("<I", 1) + b"\0\4", flags=2),
    "no layer": _header() + _step(b"", n_layers=0),
    "layer unknown": _header() + _step(_layer(0, b"\0") + _layer(7, b"\0")),
    "layer again": _header() + _step(_layer(0, b"\0") + _layer(0, b"\0")),
    "layer empty": _header() + _step(_layer(0, b"\0") + _layer(1, b"")),
    "layer long": _header() + _step(struct.pack("<HI", 0, 1 << 31) + b"\0", n_layers=1),
    "bytes left": _header() + _step(_layer(0, b"\0") + b"\0", n_layers=1),
    "cut head": _header() + _step(b"\0\0", n_layers=1),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "t").write_bytes(WRONG[name])
    with pytest.raises(TraceError):
        read_trace(tmp_path / "t")


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_bytes_after_a_header_are_read_or_refused(tmp_path_factory, tail) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("any") / "t"
    path.write_bytes(_header() + tail)
    try:
        read_trace(path)
    except EdgerouteError as error:
        assert isinstance(error, TraceError)


def test_the_recorder_keeps_the_latest_steps_within_its_bytes(tmp_path: Path) -> None:
    meta = new_meta()
    with TraceWriter(tmp_path / "t", meta) as writer:
        recorder = TraceRecorder(meta, max_bytes=5000, writer=writer)
        for number in range(100):
            recorder.begin_step(prefill=number == 99)
            scratch = np.array([[number % 60, 3]], np.int32)
            for il in meta.layers:
                recorder.record(il, scratch)
            scratch[:] = 0  # the engine reuses its buffer
        recorder.begin_step()
        kept = recorder.trace()
    assert recorder.n_dropped + len(kept.steps) == 100
    assert sum(step.n_bytes for step in kept.steps) <= 5000 < 100 * kept.steps[0].n_bytes
    assert kept.steps[-1].prefill and not kept.steps[-2].prefill
    assert kept.steps[-1].flat.tolist() == [39, 3] * 3
    assert all(map(same, reversed(kept.steps), reversed(read_trace(tmp_path / "t").steps)))


@pytest.mark.parametrize(
    "chosen",
    [
        [],
        [(1, [])],
        [(0, [1, 2])],
        [(1, [1, 2]), (1, [1, 2])],
        [(1, [60])],
        [(1, [-1])],
        [(1, [0.5])],
        [(1, [1 << 40])],
    ],
)
def test_impossible_steps_are_refused(chosen: list[tuple[int, list[int]]]) -> None:
    with pytest.raises(TraceError):
        make_step(new_meta(), False, chosen)


def test_a_refused_step_does_not_spoil_the_next() -> None:
    recorder = TraceRecorder(new_meta())
    recorder.begin_step()
    recorder.record(0, [1, 2])
    with pytest.raises(TraceError):
        recorder.end_step()
    recorder.record(1, [1, 2])
    recorder.end_step()
    assert len(recorder.trace().steps) == 1


def test_pages_are_distinct_in_order_of_first_use() -> None:
    assert pages_of(3, [5, 1, 5, 0, 1], 10) == [35, 31, 30]
