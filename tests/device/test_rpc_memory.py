"""A device that runs out of memory: refused with numbers, nothing leaked, and it answers on."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeroute import Runtime, placing
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError
from edgeroute.tools import synth
from edgeroute.tools.bench.rpc_servers import RpcServer, rpc_server
from tests.device.equal_lab import SETTINGS, ask, balanced
from tests.edgeroute.adapter_lab import make

pytestmark = pytest.mark.usefixtures("same_kernels")
LENT = 64 << 20
NUMBERS = re.compile(r"\d+(\.\d+)? (B|KiB|MiB|GiB)")


@pytest.fixture(scope="module")
def lent(rpc: RpcServer) -> Iterator[RpcServer]:
    """A server that lends exactly so much; `rpc` skips where there can be none."""
    with rpc_server(memory=LENT) as server:
        assert server.memory_bytes == LENT
        yield server


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp("rpc-memory") / "m.gguf"
    synth.make("llama", found, n_layer=4, weight_type="Q8_0")
    return found


@pytest.fixture(scope="module")
def expected(path: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Device, "_find_extra_buffer_types", lambda *_: ())
        with Runtime(path, **SETTINGS) as runtime:
            return ask(runtime)


def free_bytes(server: RpcServer) -> int:
    """What the server still lends, as it says itself."""
    with Device.open(server.name) as device:
        return device.memory()[0]


@contextlib.contextmanager
def others(server: RpcServer, free: int) -> Iterator[None]:
    """Hold memory of the device until so much is free."""
    with Device.open(server.name) as device:
        buffer = device.allocate(device.memory()[0] - free)
        try:
            assert device.memory()[0] == free
            yield
        finally:
            buffer.free()


def unforeseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans believe in memory that is not there: what refuses is the device."""
    monkeypatch.setattr(placing, "device_budget", lambda *_: 1 << 30)


def needed(server: RpcServer, path: Path, **settings: Any) -> int:
    """What an opened model takes of the device."""
    with Runtime(path, **SETTINGS | settings | {"device": server.name}) as runtime:
        ask(runtime)
        return LENT - runtime._loaded.devices.accelerators[0].memory()[0]


def test_what_is_foreseen_is_shared_or_refused(lent: RpcServer, path: Path, expected: Any) -> None:
    """The processor has the layers that do not fit; one layer must."""
    most = needed(lent, path)
    refused = shared = 0
    for share in (0.02, 0.2, 0.6, 0.8, 1.1):
        with others(lent, int(most * share)):
            try:
                with Runtime(path, device=lent.name, **SETTINGS) as runtime:
                    assert ask(runtime) == expected, share
                    shared += 1
            except CapacityError as refusal:
                assert NUMBERS.search(str(refusal)), refusal
                refused += 1
        assert free_bytes(lent) == LENT, share
    assert refused and shared > 1


@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
def test_loading_that_the_device_refuses(
    arch: str, lent: RpcServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whatever allocation it ends: weights, cells, slots of adapters, compute buffers."""
    path = tmp_path / "m.gguf"
    synth.make(arch, path, weight_type="Q8_0")
    make(tmp_path / "a.gguf", path, rank=8)
    settings: dict[str, Any] = SETTINGS | {
        "adapters": str(tmp_path / "a.gguf"), "adapter_state": "off", "device": lent.name,
    }  # fmt: skip
    most = needed(lent, path, **settings)
    unforeseen(monkeypatch)
    for share in (0.0, 0.3, 0.6, 0.8, 0.9, 0.97):
        with others(lent, int(most * share)):
            with pytest.raises(CapacityError) as refusal, Runtime(path, **settings):
                pass
            assert NUMBERS.search(str(refusal.value)) and lent.name in str(refusal.value)
        assert free_bytes(lent) == LENT, share
    with Runtime(path, **settings) as runtime:
        ask(runtime, adapter="a")
    assert free_bytes(lent) == LENT


def test_more_cells_than_there_is_memory_for(lent: RpcServer, path: Path, expected: Any) -> None:
    """A pool larger than the device is shared out no more than layers allow, or refused."""
    with pytest.raises(CapacityError, match=NUMBERS):
        Runtime(path, device=lent.name, **SETTINGS | {"n_kv": 1 << 18, "n_ctx": 1 << 18})
    assert free_bytes(lent) == LENT
    with Runtime(path, device=lent.name, **SETTINGS) as runtime:
        assert ask(runtime) == expected
    assert free_bytes(lent) == LENT


@pytest.fixture
def library(path: Path, tmp_path: Path) -> list[Path]:
    """Adapters of one kind of weight, and one of others."""
    found = [make(tmp_path / f"{name}.gguf", path, rank=8, seed=seed, delta=0.5,
                  targets=("attn_q", "ffn_up")) for seed, name in enumerate("abcd")]  # fmt: skip
    return [*found, make(tmp_path / "other.gguf", path, rank=8, targets=("ffn_down", "attn_v"))]


def test_adapters_that_the_device_has_no_room_for(
    lent: RpcServer, path: Path, library: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots for other weights, while the runtime is open; it goes on with those it has."""
    settings = SETTINGS | {"adapters": tuple(map(str, library[:4])), "adapter_state": "off",
                           "adapter_slots": 4, "device": lent.name}  # fmt: skip
    with Runtime(path, **settings) as runtime:
        before = ask(runtime), ask(runtime, adapter="a")
        free = runtime._loaded.devices.accelerators[0].memory()[0]
        unforeseen(monkeypatch)
        with others(lent, 4096):
            with pytest.raises(CapacityError, match=NUMBERS):
                runtime.add_adapter(library[4])
            assert "other" not in runtime.adapters
            assert (ask(runtime), ask(runtime, adapter="a")) == before
        assert runtime._loaded.devices.accelerators[0].memory()[0] == free
        runtime.add_adapter(library[4])
        assert ask(runtime, adapter="other") != before[0]
        balanced(runtime)
    assert free_bytes(lent) == LENT


def test_a_compute_buffer_that_cannot_grow(
    lent: RpcServer, path: Path, library: list[Path]
) -> None:
    """A mixture takes a wider graph than memory was sized for: it fails, and nothing else."""
    settings = SETTINGS | {"adapters": tuple(map(str, library[:4])), "adapter_state": "off",
                           "adapter_slots": 4, "device": lent.name, "n_ubatch": 512}  # fmt: skip
    wide = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}
    with Runtime(path, **settings) as runtime:
        device = runtime._loaded.devices.accelerators[0]
        before = ask(runtime, 400), ask(runtime, 400, adapter="a", prefix="off")
        small = device.memory()[0]
        with others(lent, 4096):
            with pytest.raises(CapacityError, match=NUMBERS):
                ask(runtime, 400, adapter=wide, prefix="off")
            # The buffer went with the attempt, and comes again as large as it has to be.
            again = ask(runtime, 400), ask(runtime, 400, adapter="a", prefix="off")
            assert again == before
            balanced(runtime)
        assert device.memory()[0] >= small
        ask(runtime, 400, adapter=wide, prefix="off")
        assert device.memory()[0] < small
    assert free_bytes(lent) == LENT


def test_a_device_that_is_full_refuses_buffers(lent: RpcServer) -> None:
    """The last byte is lent, one more is not; what is given back is there again."""
    with Device.open(lent.name) as device:
        rng = np.random.default_rng(1)
        held = []
        while (free := device.memory()[0]) > 1 << 20:
            held.append(device.allocate(int(rng.integers(1, free + 1))))
            assert device.memory()[0] == free - held[-1].n_bytes
        with pytest.raises(CapacityError, match=r"could not allocate 1 MiB|1.00 MiB") as refusal:
            device.allocate(1 << 20)
        assert lent.name in str(refusal.value)
        held.append(device.allocate(device.memory()[0]))
        assert device.memory()[0] == 0
        for buffer in held:
            buffer.free()
        assert device.memory()[0] == LENT


def test_tiers_on_a_device_that_refuses(
    lent: RpcServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots for experts, where the plan believed in more than there is."""
    path = tmp_path / "m.gguf"
    synth.write(replace(synth.ARCHITECTURES["qwen3moe"], n_layer=4, n_embd=128, n_ff=128,
                        n_ff_exp=128, n_head=2, n_head_kv=1, n_embd_head=64, n_expert=64,
                        n_expert_used=3, weight_type="Q8_0"), path)  # fmt: skip
    settings = SETTINGS | {"n_kv": 512, "device": lent.name}
    with pytest.raises(CapacityError) as told, Runtime(path, **settings, device_memory=1):
        pass
    least = told.value.smallest_bytes
    assert least is not None
    settings["device_memory"] = least + (2 << 20)
    with Runtime(path, **settings) as runtime:
        expected = ask(runtime)
        taken = LENT - runtime._loaded.devices.accelerators[0].memory()[0]
    assert free_bytes(lent) == LENT
    memory = Device.memory
    for share in (0.1, 0.5, 0.9):
        with others(lent, int(taken * share)), monkeypatch.context() as patch:
            patch.setattr(Device, "memory", lambda _: (LENT, LENT))
            with pytest.raises(CapacityError, match=NUMBERS):
                Runtime(path, **settings)
            patch.setattr(Device, "memory", memory)
        assert free_bytes(lent) == LENT
    with Runtime(path, **settings) as runtime:
        assert ask(runtime) == expected
