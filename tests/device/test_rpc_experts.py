"""Experts on a device of another process, all there or read by I/O threads: the same bits."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeroute import Runtime
from edgeroute.models.paged import PagedForward
from edgeroute.runtime import slots as slots_module
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.slots import Slots
from edgeroute.runtime.tensor import get_range
from edgeroute.tools import synth
from edgeroute.tools.bench.rpc_servers import RpcServer
from tests.device.equal_lab import SETTINGS, ask, balanced, together
from tests.edgeroute.paged_lab import EVERYTHING, LESS, SMALL, Lab, equal

pytestmark = pytest.mark.usefixtures("same_kernels")
MOE = [name for name, spec in synth.ARCHITECTURES.items() if spec.n_expert]


@contextlib.contextmanager
def labs(path: Path, rpc: RpcServer) -> Iterator[tuple[Any, Any]]:
    """One file, opened on the processor and on the device."""
    with contextlib.ExitStack() as own:
        here, there = Lab(path), Lab(path, device=rpc.name)
        own.callback(here.close)
        own.callback(there.close)
        assert not there.device.info.host_pointers
        yield here, there


@pytest.mark.parametrize("arch", MOE)
def test_every_architecture(arch: str, rpc: RpcServer, tmp_path: Path) -> None:
    """All experts there; and slots for the fewest that are legal, written by I/O threads."""
    synth.make(arch, tmp_path / "m.gguf")
    with labs(tmp_path / "m.gguf", rpc) as (here, there):
        assert equal(there.resident(LESS), here.resident(LESS))
        with there.paged(prefetch="gate", forced=True) as paged:
            assert equal(paged.run(LESS), here.resident(LESS))
            assert paged.counts().misses and paged.counts().evictions
            paged.settle()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "MXFP4"])
def test_every_type(kind: str, rpc: RpcServer, tmp_path: Path) -> None:
    spec = replace(SMALL, n_layer=2, weight_type=kind)
    if kind == "Q4_K":
        spec = replace(spec, n_embd=256, n_ff=256, n_ff_exp=256, n_embd_head=128, n_head_kv=2)
    synth.write(spec, tmp_path / "m.gguf")
    with labs(tmp_path / "m.gguf", rpc) as (here, there):
        assert equal(there.resident(LESS), here.resident(LESS))
        with there.paged(slots=4, prefetch="gate", forced=True) as paged:
            assert equal(paged.run(LESS), here.resident(LESS))


@pytest.mark.parametrize("overlap", [True, False])
def test_many_reads_at_once_and_slots_that_come_and_go(
    overlap: bool, rpc: RpcServer, tmp_path: Path
) -> None:
    """Four threads write slots while the engine computes with others."""
    synth.write(SMALL, tmp_path / "m.gguf")
    with labs(tmp_path / "m.gguf", rpc) as (here, there):
        expected = here.resident(EVERYTHING)
        with there.paged(slots=6, io_threads=4, prefetch="gate", forced=True,
                         overlap=overlap) as paged:  # fmt: skip
            for slots in (6, 2, 12, 5):
                paged.store.resize(there.slots_bytes(slots))
                assert equal(paged.run(EVERYTHING), expected), slots
            paged.settle()


def test_slots_are_written_in_any_order(
    rpc: RpcServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor placed for one slot alone would have the next one's first bytes cleared on CUDA."""
    synth.write(replace(SMALL, weight_type="Q8_0"), tmp_path / "m.gguf")
    with labs(tmp_path / "m.gguf", rpc) as (_, there):
        layer, rng = there.pools[0].layers[0].infos, np.random.default_rng(2)
        with Slots(there.device, [layer], 5) as slots:
            sizes = [info.nbytes // info.ne[2] for info in layer]
            written = rng.integers(0, 256, (5, sum(sizes)), np.uint8)
            monkeypatch.setattr(slots_module, "place", None)
            for slot in (3, 4, 1, 0, 2):
                sink, at = slots.sink(slot, layer), 0
                for part, size in enumerate(sizes):
                    assert sink.destination(part) is None
                    for first in range(0, size, 1000):
                        data = written[slot, at + first : at + min(first + 1000, size)]
                        sink.write(part, first, memoryview(data))
                    at += size
            at = 0
            for part, (tensor, size) in enumerate(zip(slots.tensors(layer), sizes, strict=True)):
                for slot in range(5):
                    found = np.empty(size, np.uint8)
                    get_range(tensor, found, slots.offset(slot, part))
                    assert np.array_equal(found, written[slot, at : at + size])
                at += size


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of 20 MiB in all, where what is beside them takes half of that."""
    found: Path = tmp_path_factory.mktemp("rpc-experts") / "m.gguf"
    spec = replace(
        synth.ARCHITECTURES["qwen3moe"], n_layer=6, n_embd=128, n_ff=128, n_ff_exp=128, n_head=2,
        n_head_kv=1, n_embd_head=64, n_expert=64, n_expert_used=3, weight_type="Q8_0",
    )  # fmt: skip
    synth.write(spec, found)
    return found


def scenario(runtime: Runtime) -> Any:
    alone = [ask(runtime, n, text=n) for n in (5, 150)]
    found = alone, together(runtime, [{"n": 30, "text": i} for i in range(3)])
    balanced(runtime)
    return found


@pytest.mark.parametrize("host_experts", ["off", "on", "auto"])
def test_a_device_without_room_for_all(host_experts: str, rpc: RpcServer, path: Path) -> None:
    """The rest is kept in DRAM, and sent or computed there: the answers are the same."""
    plain = SETTINGS | {"max_batch": 1, "n_kv": 512}
    with Runtime(path, **plain) as runtime:
        expected = scenario(runtime)
    settings = plain | {"device": rpc.name, "host_experts": host_experts}
    with Runtime(path, **settings) as runtime:
        assert scenario(runtime) == expected
        assert not isinstance(runtime._loaded.forward, PagedForward)
    with pytest.raises(CapacityError) as refusal, Runtime(path, **settings, device_memory=1):
        pass
    least = refusal.value.smallest_bytes
    assert least is not None
    with Runtime(path, **settings, device_memory=least + (1 << 20)) as runtime:
        assert isinstance(runtime._loaded.forward, PagedForward)
        assert scenario(runtime) == expected
