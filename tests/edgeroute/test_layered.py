"""Layers that stream give the bits of resident ones: any family, type, budget and ring."""

import contextlib
import errno
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgeroute import Runtime, paging_layers
from edgeroute.config import RunParams
from edgeroute.loaded import LoadedModel
from edgeroute.models.forward import Forward, Piece
from edgeroute.models.layered import LayeredForward
from edgeroute.offload.disk import DiskFile
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.depth import all_run
from edgeroute.runtime.errors import CapacityError, ModelFileError
from edgeroute.runtime.units import MIB
from edgeroute.tools import synth
from tests.edgeroute.layered_lab import plain_machine

ARCHS = ["llama", "llama-bias", "qwen2", "gemma3"]
TYPES = ["F32", "Q8_0", "Q4_0", "Q4_K"]
PARAMS: dict[str, Any] = {"n_ctx": 512, "n_ubatch": 64, "threads": 1, "max_batch": 2}
STEPS = [("a", 64, 0), ("a", 40, 40), ("a", 3, 1), *[("a", 1, 1)] * 3, ("b", 17, 1), ("b", 1, 1)]

Answers = list[npt.NDArray[np.float32]]


@pytest.fixture(autouse=True)
def _slim_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of tiny models stream; refusals name bytes."""
    plain_machine(monkeypatch, MIB=1)


@contextlib.contextmanager
def opened(path: Path, memory: int | None = None) -> Iterator[LoadedModel]:
    loaded = LoadedModel(path, RunParams(**PARAMS, memory=memory))
    try:
        loaded.device.set_threads(1)
        yield loaded
    finally:
        loaded.close()


def play(forward: Forward, spans: tuple[Span, ...] | None = None) -> Answers:
    """Prefill in parts, decode, and another sequence beside it."""
    rng = np.random.default_rng(3)
    regions, n_past, found = {}, dict.fromkeys("ab", 0), []
    for name in n_past:
        regions[name] = forward.kv.allocate(256)
        assert regions[name] is not None
    for name, n_tokens, n_out in STEPS:
        tokens = rng.integers(4, 380, n_tokens).tolist()
        logits = forward.run([Piece(tokens, n_past[name], regions[name], n_out)], spans)
        assert logits is not None
        n_past[name] += n_tokens
        found.append(logits.copy())
    for region in regions.values():
        forward.kv.release(region)
    return found


def equal(ours: Answers, theirs: Answers) -> bool:
    return all(
        np.array_equal(a, b) and bool(np.isfinite(a).all())
        for a, b in zip(ours, theirs, strict=True)
    )


def smallest_budget(path: Path) -> int:
    """What the refusal of a hopeless budget names."""
    with pytest.raises(CapacityError) as refusal, opened(path, 1):
        pass
    named = re.search(r"at least (\d+) MiB", str(refusal.value))
    assert named is not None, refusal.value
    return int(named[1])


def plan_of(path: Path, memory: int) -> tuple[int, ...]:
    """Which units stream at a budget."""
    with opened(path, memory) as loaded:
        return () if loaded.layers is None else tuple(sorted(loaded.layers.streamed))


@pytest.mark.parametrize("n_rooms", [2, 3])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_equal_bits_at_every_budget(
    arch: str, kind: str, n_rooms: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the smallest legal budget in steps to all but everything."""
    path = tmp_path / "model.gguf"
    synth.write(replace(synth.ARCHITECTURES[arch], n_layer=6, weight_type=kind), path)
    plan_layers = paging_layers.plan_layers
    monkeypatch.setattr(
        paging_layers, "plan_layers", lambda *args: plan_layers(*args, n_rooms=n_rooms)
    )
    with opened(path) as resident:
        assert resident.layers is None
        expected = play(resident.forward)
        whole = resident.plan.total_bytes
    low = smallest_budget(path)
    assert low < whole
    n_streamed = []
    for budget in np.linspace(low, whole - 1, 4).astype(int).tolist():
        with opened(path, budget) as loaded:
            assert equal(play(loaded.forward), expected), budget
            assert loaded.ledger.used_bytes <= budget
            n_streamed.append(len(loaded.layers.streamed) if loaded.layers else 0)
            if loaded.layers is not None:
                assert loaded.layers.n_rooms == min(n_rooms, n_streamed[-1])
                assert int(loaded.layers.stats()["bytes"]) > 0
    assert n_streamed == sorted(n_streamed, reverse=True)
    assert n_streamed[0] >= 3


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers of 2.5 MiB, a head smaller than that."""
    found = tmp_path_factory.mktemp("layered") / "model.gguf"
    synth.write(replace(synth.ARCHITECTURES["llama"], n_layer=12), found)
    return found


def test_a_head_streams_where_it_must(path: Path) -> None:
    """The smallest budget of all; the head is held together with the last layer."""
    low = smallest_budget(path)
    assert plan_of(path, low) == tuple(range(13))
    assert plan_of(path, low + 2 * MIB) != tuple(range(13))
    with opened(path) as resident:
        expected = play(resident.forward)
    with opened(path, low) as loaded:
        assert equal(play(loaded.forward), expected)


def test_a_budget_too_small_is_refused_with_numbers(path: Path) -> None:
    low = smallest_budget(path)
    with pytest.raises(CapacityError, match="raise the memory budget to at least"):
        plan_of(path, low - 1)


def test_a_layer_that_no_span_names_is_not_read(path: Path) -> None:
    """Half of the layers: the bits of the same depth computed resident, and half the bytes."""
    some = (Span(all_run((0, 1, 3, 4, 7, 9, 10)), embed=True, output=True),)
    with opened(path) as resident:
        expected = play(resident.forward, some)
        assert not equal(expected, play(resident.forward))
    with opened(path, smallest_budget(path) + 2 * MIB) as loaded:
        store = loaded.layers
        assert store is not None
        assert equal(play(loaded.forward, some), expected)
        part = int(store.stats()["bytes"])
        assert equal(play(loaded.forward, loaded.forward.by_layer()), play(loaded.forward))
        assert part < (int(store.stats()["bytes"]) - part) / 2 * 0.75


def test_answers_and_statistics_of_a_runtime(path: Path) -> None:
    prompts = [list(range(5, 5 + n)) for n in (3, 90, 200)]
    with Runtime(path, **PARAMS) as resident:
        assert "layers" not in resident.stats()
        expected = [resident.generate(prompt_ids=p, max_tokens=8).token_ids for p in prompts]
    with Runtime(path, **PARAMS, memory=smallest_budget(path) + 6 * MIB) as runtime:
        assert isinstance(runtime._loaded.forward, LayeredForward)
        one = runtime.generate(prompt_ids=prompts[1], max_tokens=4, prefix="off").stats.to_dict()
        mine: Any = one["layers"]
        assert mine["resident"] + mine["streamed"] == 13
        assert 0 < mine["bytes"] <= runtime.stats()["layers"]["bytes"]  # type: ignore[index]
        assert mine["stall_s"] >= 0
        streams = [runtime.stream(prompt_ids=p, max_tokens=8) for p in prompts]
        ends = [list(stream)[-1].generation for stream in streams]
        assert [end.token_ids for end in ends if end is not None] == expected
        stats: dict[str, Any] = runtime.stats()
        layers = stats["layers"]
        assert layers["resident"] + layers["streamed"] == 13
        assert layers["streamed"] >= 2 and layers["resident"] >= 2
        assert layers["bytes"] > 0 and layers["stall_s"] >= 0
        assert sum(stats["memory"].values()) <= stats["budget_bytes"]
        assert "run_ahead" not in stats["levers"]  # each pass reads layers: drafts share them


class _Faults:
    """Reads of every DiskFile, until told otherwise."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.mode = ""
        self.n_reads = 0
        self.on_read = lambda: None
        read_at = DiskFile.read_at

        def read(disk: DiskFile, offset: int, *buffers: memoryview) -> int:
            self.n_reads += 1
            self.on_read()
            if self.mode == "eio":
                raise OSError(errno.EIO, "Input/output error")
            return 0 if self.mode == "short" else read_at(disk, offset, *buffers)

        patch.setattr(DiskFile, "read_at", read)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> _Faults:
    return _Faults(monkeypatch)


@pytest.mark.parametrize("mode", ["eio", "short"])
def test_a_failing_disk_fails_the_request_and_no_other(
    mode: str, path: Path, faults: _Faults
) -> None:
    prompt = list(range(5, 150))
    with Runtime(path, **PARAMS, memory=smallest_budget(path)) as runtime:
        expected = runtime.generate(prompt_ids=prompt, max_tokens=6, prefix="off").token_ids
        faults.mode = mode
        for _ in range(2):
            with pytest.raises(ModelFileError):
                runtime.generate(prompt_ids=prompt, max_tokens=6, prefix="off")
        faults.mode = ""
        found = runtime.generate(prompt_ids=prompt, max_tokens=6, prefix="off").token_ids
        assert found == expected
        stats = runtime.stats()
        assert stats["kv_free_cells"] + stats["kv_kept_cells"] == stats["kv_cells"]  # type: ignore[operator]


def test_a_cancel_in_prefill_and_what_follows(path: Path, faults: _Faults) -> None:
    prompt = list(range(5, 300))
    with Runtime(path, **PARAMS, memory=smallest_budget(path)) as runtime:
        expected = runtime.generate(prompt_ids=prompt, max_tokens=6, prefix="off").token_ids
        for n in (1, 9, 20):
            stream = runtime.stream(prompt_ids=prompt, max_tokens=6, prefix="off")
            until = faults.n_reads + n
            faults.on_read = lambda until=until, stream=stream: (
                stream.cancel() if faults.n_reads == until else None
            )
            chunks = list(stream)
            assert chunks[-1].finish_reason == "cancelled"
        faults.on_read = lambda: None
        found = runtime.generate(prompt_ids=prompt, max_tokens=6, prefix="off").token_ids
        assert found == expected


def test_closing_while_a_layer_is_loaded(path: Path, faults: _Faults) -> None:
    runtime = Runtime(path, **PARAMS, memory=smallest_budget(path))
    stream = runtime.stream(prompt_ids=list(range(5, 300)), max_tokens=50)
    next(iter(stream))
    runtime.close()
    with pytest.raises(Exception, match="closed"):
        list(stream)


def test_a_changed_file_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    low = smallest_budget(path)
    monkeypatch.setattr("edgeroute.runtime.gguf.GGUFFile.is_same", lambda *_: False)
    with pytest.raises(ModelFileError, match="changed"), opened(path, low):
        pass


def test_scarce_memory_changes_the_split_and_no_bit(path: Path) -> None:
    """Layers are given up and taken back between passes, by the store's own reading."""
    low = smallest_budget(path)
    with opened(path) as resident:
        expected = play(resident.forward)
    with opened(path, low + 20 * MIB) as loaded:
        store = loaded.layers
        assert store is not None
        before = store.streamed
        assert len(before) <= 8
        seen = set()
        high = store.pressure.params.high_bytes + store.resident_bytes
        reading = [0]

        def available() -> int:
            seen.add(len(store.streamed))
            reading[0] = (reading[0] + 1) % 8
            return 0 if reading[0] < 2 else 4 * high

        store.available = available
        for _ in range(4):
            store._next_reading = 0.0
            assert equal(play(loaded.forward), expected)
        for _ in range(60):
            store._next_reading = 0.0
            store.available = lambda: 4 * high
            store.reconsider()
        assert store.streamed == before
        assert equal(play(loaded.forward), expected)
    assert max(seen) == 12  # all but the head


def test_equal_kernels_without_a_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`repack_experts=False` gives a dense model that fits the kernels of a streamed one."""
    monkeypatch.undo()
    path = tmp_path / "model.gguf"
    synth.write(replace(synth.ARCHITECTURES["llama"], weight_type="Q4_0"), path)
    loaded = LoadedModel(path, RunParams(**PARAMS, repack_experts=False))
    assert not loaded.plan.weights.repacked
    loaded.close()
