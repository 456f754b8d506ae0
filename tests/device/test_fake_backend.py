"""Devices as CUDA and others are, through a fake backend: queues, events, pinned and shared memory.

Every branch of runtime/device.py runs here, and a whole model on such a device has the bits that it
has on the processor.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import edgeroute
from edgeroute import device_speed
from edgeroute.config import RunParams
from edgeroute.device_speed import DeviceSpeed
from edgeroute.device_support import Probe, unsupported
from edgeroute.loaded import kv_shape
from edgeroute.models.registry import describe
from edgeroute.runtime.built_graph import Graph
from edgeroute.runtime.cell_views import CellViews
from edgeroute.runtime.device import Device, devices
from edgeroute.runtime.device_ops import lacking
from edgeroute.runtime.errors import (
    CapacityError,
    ComputeError,
    LibraryError,
    UnsupportedModelError,
    UsageError,
)
from edgeroute.runtime.ggml import api
from edgeroute.runtime.ggml.api import ggml
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.graph_cache import GraphCache
from edgeroute.runtime.graph_inputs import Inputs
from edgeroute.runtime.tensor import (
    F16,
    F32,
    I32,
    Descriptors,
    get_bytes,
    new_tensor,
    place_all,
    set_bytes,
)
from edgeroute.tools.synth import make
from tests.device import fake_backend as fakes
from tests.device.fake_backend import Fake, fake_device, fake_devices

CONFIGS = {
    "queued": Fake(),
    "one queue": Fake(second=False),
    "no events": Fake(events=False),
    "plain host memory": Fake(pinned=False),
    "synchronous": Fake(asynchronous=False, events=False, pinned=False),
    "integrated": Fake(kind="igpu"),
    "host pointers": Fake(host_pointers=True),
}
SETTINGS = {"threads": 1, "n_ctx": 256, "n_ubatch": 64, "repack_experts": False}


class Doubling:
    """A tensor of four values on a device, and a graph there that doubles it."""

    def __init__(self, device: Device) -> None:
        g, self._descriptors = ggml(), Descriptors(8, 8)
        self.tensor = new_tensor(self._descriptors, F32, (4,), "tensor")
        self.doubled = g.ggml_scale(self._descriptors.ctx, self.tensor, 2.0)
        self.graph = g.ggml_new_graph_custom(self._descriptors.ctx, 8, False)
        g.ggml_build_forward_expand(self.graph, self.doubled)
        self._buffer = place_all([self.tensor, self.doubled], device)
        set_bytes(self.tensor, np.arange(4, dtype=np.float32))

    def read(self) -> list[float]:
        found = np.empty(4, np.float32)
        get_bytes(self.doubled, found)
        return found.tolist()

    def free(self) -> None:
        self._buffer.free()
        self._descriptors.free()


@pytest.fixture
def doubling() -> Iterator[tuple["fakes.FakeDevice", Device, Doubling]]:
    with fake_device() as fake, Device.open("fake0") as device:
        made = Doubling(device)
        yield fake, device, made
        made.free()


def test_a_device_says_what_it_can() -> None:
    for name, config in CONFIGS.items():
        with fake_device(config), Device.open("FAKE0") as device:
            info = device.info
            assert (info.asynchronous, info.events) == (config.asynchronous, config.events), name
            assert (info.pinned, info.host_pointers) == (config.pinned, config.host_pointers)
            assert (info.kind, info.name) == (config.kind, "fake0")
            assert info.description == f"a fake {config.kind}"
            assert info.unified == (name in ("integrated", "host pointers"))
            assert info.memory_free_bytes == info.memory_total_bytes == config.memory_bytes
            assert not device.is_cpu
    assert "fake0" not in [info.name for info in devices()]


def test_the_first_gpu_is_taken_and_an_integrated_one_where_there_is_no_other() -> None:
    with fake_devices(Fake(kind="igpu"), Fake()), Device.open("gpu") as device:
        assert device.info.name == "fake1"
    with fake_device(Fake(kind="igpu")):
        for name in ("gpu", "igpu"):
            with Device.open(name) as device:
                assert device.info.name == "fake0"
        with pytest.raises(UsageError, match=r"fake1.*CPU.*fake0"):
            Device.open("fake1")


def test_a_device_that_is_in_use_elsewhere_is_refused() -> None:
    with fake_device(Fake(second=False)) as fake, Device.open("fake0"):
        with pytest.raises(LibraryError, match="fake0"):
            Device.open("fake0")
        assert fake.n_instances == 1


def test_memory_is_asked_for_again_and_its_limit_is_exact() -> None:
    with fake_device(Fake(memory_bytes=1 << 20)) as fake, Device.open("fake0") as device:
        half = device.allocate(1 << 19)
        assert device.memory() == (1 << 19, 1 << 20)
        with pytest.raises(CapacityError, match=r"fake0 could not allocate 512 KiB"):
            device.allocate((1 << 19) + 1)
        other = device.allocate(1 << 19)
        assert device.memory() == (0, 1 << 20)
        other.free()
        half.free()
        half.free()
        assert not fake.n_live and device.memory() == (1 << 20, 1 << 20)


def test_host_memory_becomes_a_buffer_where_the_device_shares_it() -> None:
    values = np.zeros(1 << 12, np.uint8)
    with fake_device(Fake(host_pointers=True)) as fake, Device.open("fake0") as device:
        buffer = device.wrap_host_memory(values.ctypes.data, values.nbytes, values.nbytes)
        assert buffer is not None and buffer.base == values.ctypes.data and not fake.used_bytes
        buffer.free()
        assert not fake.n_live
    with fake_device() as fake, Device.open("fake0") as device:
        assert device.wrap_host_memory(values.ctypes.data, values.nbytes, values.nbytes) is None


def test_the_host_is_free_between_begin_and_end(
    doubling: tuple["fakes.FakeDevice", Device, Doubling],
) -> None:
    fake, device, work = doubling
    device.compute_begin(work.graph)
    assert fake.n_computed == 0 and work.read() != [0, 2, 4, 6]
    before = device.beat
    assert device.compute_end()
    assert fake.n_computed == 1 and work.read() == [0, 2, 4, 6] and device.beat >= before
    assert device.compute(work.graph)


def test_a_device_without_a_queue_computes_when_it_begins() -> None:
    with fake_device(Fake(asynchronous=False)) as fake, Device.open("fake0") as device:
        work = Doubling(device)
        device.compute_begin(work.graph)
        assert fake.n_computed == 1 and device.compute_end()
        work.free()


def test_the_first_failure_of_several_graphs_is_told(
    doubling: tuple["fakes.FakeDevice", Device, Doubling],
) -> None:
    fake, device, work = doubling
    for status in (-1, api.STATUS_SUCCESS):
        fake.status = status
        device.compute_begin(work.graph)
    with pytest.raises(ComputeError, match="fake0: status -1"):
        device.compute_end()
    device.compute_begin(work.graph)
    assert device.compute_end()
    fake.status = api.STATUS_ABORTED
    device.compute_begin(work.graph)
    assert not device.compute_end() and not device.compute(work.graph)


def test_a_device_without_threads_or_stops_takes_both_settings(
    doubling: tuple["fakes.FakeDevice", Device, Doubling],
) -> None:
    """`stop_flag` is raised, and the graph ends all the same: its users look between graphs."""
    _, device, work = doubling
    device.set_threads(3)
    device.stop_flag.set()
    device.watch_stop_flag(True)
    assert device.n_threads == 3 and device.stop_flag.is_set()
    assert device.compute(work.graph) and work.read() == [0, 2, 4, 6]


# operations


def test_operations_that_a_device_lacks_are_named() -> None:
    g = ggml()
    with fake_device(Fake(refuses=frozenset(("MUL_MAT", "GET_ROWS", "CPY")))), \
            Device.open("fake0") as device:  # fmt: skip
        descriptors = Descriptors(16, 16)
        ctx = descriptors.ctx
        a = new_tensor(descriptors, F16, (32, 8), "a")
        x = new_tensor(descriptors, F32, (32, 4), "x")
        ids = new_tensor(descriptors, I32, (2,), "ids")
        place = new_tensor(descriptors, F16, (8, 2), "place")
        y = g.ggml_get_rows(ctx, g.ggml_mul_mat(ctx, a, x), ids)
        out = g.ggml_cpy(ctx, g.ggml_scale(ctx, y, 2.0), place)
        graph = g.ggml_new_graph_custom(ctx, 16, False)
        g.ggml_build_forward_expand(graph, out)
        assert lacking(device, graph) == [
            "MUL_MAT with weights of f16", "GET_ROWS with rows of f32", "CPY of f32 to f16",
        ]  # fmt: skip
        with Device.open("cpu") as cpu:
            assert lacking(cpu, graph) == []
        descriptors.free()


def test_a_graph_that_a_device_cannot_compute_is_refused() -> None:
    """ggml would end the process in the middle of it."""
    with fake_device(Fake(refuses=frozenset(("SCALE",)))) as fake, \
            Device.open("fake0") as device:  # fmt: skip
        cache, descriptors = GraphCache(device), Descriptors(8, 8)
        g, ctx = ggml(), descriptors.ctx
        doubled = g.ggml_scale(ctx, new_tensor(descriptors, F32, (4,), "tensor"), 2.0)
        graph = g.ggml_new_graph_custom(ctx, 8, False)
        g.ggml_build_forward_expand(graph, doubled)
        with pytest.raises(UnsupportedModelError, match="fake0 cannot compute SCALE with values"):
            cache.add("key", Graph(graph, Inputs(), doubled, descriptors, CellViews([], 0)))
        assert cache.find("key") is None and not fake.n_allocated
        cache.close()


@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
def test_layers_that_a_device_cannot_compute_are_found(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By descriptions alone: nothing is allocated on the device."""
    make(arch, tmp_path / "model.gguf")
    with GGUFFile.open(tmp_path / "model.gguf") as file:
        model = describe(file)
        params = RunParams(**SETTINGS)  # type: ignore[arg-type]
        probe = Probe(file=file, model=model, kv=kv_shape(model.hparams, params),
                      n_ubatch=params.n_ubatch)  # fmt: skip
        layers = set(range(model.hparams.n_layer))
        for refused, where in (
            ((), set()),
            (("FLASH_ATTN_EXT",), layers),
            (("MUL_MAT",), layers | {model.hparams.n_layer}),
            (("MUL_MAT_ID",), layers if model.hparams.moe else set()),
        ):
            config = Fake(refuses=frozenset(refused), fail_at=0)
            with fake_device(config) as fake, Device.open("fake0") as device:
                found = unsupported(device, probe)
                assert set(found) == where
                assert all(each.startswith(f"{refused[0]} with ")
                           for names in found.values() for each in names)  # fmt: skip
                assert not fake.n_allocated and not fake.n_live
        with Device.open("cpu") as cpu:
            assert unsupported(cpu, probe) == {}
            assert unsupported(cpu, replace(probe, adapters=True)) == {}
        with fake_device(Fake(refuses=frozenset(("OUT_PROD",)))), \
                Device.open("fake0") as device:  # fmt: skip
            assert unsupported(device, probe) == {}
            found = unsupported(device, replace(probe, adapters=True))
            assert found == {il: {"OUT_PROD with values of f32"} for il in layers}


# whole models


def answer(path: Path, device: str) -> tuple[object, ...]:
    with edgeroute.Runtime(path, device=device, **SETTINGS) as runtime:
        found = runtime.generate("a few words, twice: a few words", max_tokens=24, temperature=0,
                                 logprobs=3)  # fmt: skip
        return found.token_ids, found.logprobs


@pytest.fixture(scope="module")
def expected(tiny_path: Path) -> tuple[object, ...]:
    return answer(tiny_path, "cpu")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_has_the_bits_it_has_on_the_processor(
    name: str, tiny_path: Path, expected: tuple[object, ...]
) -> None:
    with fake_device(CONFIGS[name]) as fake:
        assert answer(tiny_path, "fake0") == expected
        assert fake.n_computed >= 24 and not fake.misuse
        assert not fake.n_live and not fake.n_instances and not fake.n_live_events


@pytest.mark.parametrize(
    ("arch", "refused", "on_device"),
    [("deepseek2", "MUL_MAT_ID", [0]), ("deepseek2", "MUL_MAT", []), ("llama", "ROPE", [])],
)
def test_what_a_device_lacks_is_computed_by_the_processor(
    arch: str, refused: str, on_device: list[int], tmp_path: Path
) -> None:
    """With the same bits, and a warning that says it once. The first layer there has no experts."""
    path = tmp_path / "model.gguf"
    make(arch, path)
    config = Fake(refuses=frozenset((refused,)))
    with fake_device(config) as fake:
        with edgeroute.Runtime(path, device="fake0", **SETTINGS) as runtime:
            stats = runtime.stats()
        devices_told, warnings = stats["devices"], stats["warnings"]
        assert isinstance(devices_told, dict) and isinstance(warnings, list)
        assert devices_told.get("fake0", {"layers": []})["layers"] == on_device
        (told,) = [each for each in warnings if "LACKS" in each]
        assert "fake0" in told and f"{refused} with" in told
        assert answer(path, "fake0") == answer(path, "cpu")
        assert not fake.n_live and not fake.n_instances


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("names", ["fake0,fake1", "fake1,cpu", "cpu,fake0,fake1"])
def test_layers_split_between_late_devices_have_the_same_bits(
    names: str, late: bool, tiny_path: Path, tmp_path: Path, expected: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """None holds the three layers; what one hands on is there before the other reads it."""

    def measure(_: Probe, device: Device) -> DeviceSpeed:
        return DeviceSpeed(decode_s=1e-3 if device.is_cpu else 1e-4, prompt_s=1e-4, entering_s=0.0,
                           upload_bytes_s=1e9, download_bytes_s=1e9)  # fmt: skip

    monkeypatch.setattr(device_speed, "measure", measure)
    monkeypatch.setattr(device_speed, "cache_path", lambda name: tmp_path / name)
    small = Fake(memory_bytes=6 << 20, asynchronous=late, events=late)
    with fake_devices(small, Fake(memory_bytes=8 << 20)) as made:
        assert answer(tiny_path, names) == expected
        assert made[0].n_computed >= 24 * ("fake0" in names) and made[1].n_computed >= 24
        assert not any(each.n_live or each.n_instances or each.misuse for each in made)


@pytest.mark.parametrize("name", ["queued", "host pointers"])
def test_no_allocation_that_fails_leaves_anything_behind(name: str, tiny_path: Path) -> None:
    """Each in turn: it is refused in a sentence, and what there was before is freed."""
    n, config = 0, CONFIGS[name]
    while True:
        with fake_device(replace(config, fail_at=n)) as fake:
            try:
                answer(tiny_path, "fake0")
            except CapacityError as error:
                assert "fake0" in str(error), n
            assert not fake.n_live and not fake.n_instances and not fake.n_live_events, n
            if fake.n_allocated <= n:
                break  # the whole answer needs no more
        n += 1
    assert n >= 2  # KV cells and the compute buffer at least


def test_a_device_too_small_says_so_and_leaves_nothing_behind(tiny_path: Path) -> None:
    with fake_device(Fake(memory_bytes=1 << 16)) as fake:
        with pytest.raises(CapacityError, match="fake0"):
            answer(tiny_path, "fake0")
        assert not fake.n_live and not fake.n_instances
