"""A Runtime whose layers are on two servers and the processor answers as the processor does."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeroute import Runtime, placing
from edgeroute.devices_open import Devices
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError, UsageError
from edgeroute.tools.bench.rpc_servers import RpcServer, rpc_server
from edgeroute.tools.synth import make
from tests.device.equal_lab import SETTINGS, ask, balanced, ids, together
from tests.edgeroute import adapter_lab
from tests.edgeroute.session_lab import settled
from tests.edgeroute.test_depth_runtime import N_LAYER, PLANS, write

pytestmark = pytest.mark.usefixtures("same_kernels")
SPREADS = {"thirds": ((2, 2, 2), 2), "head here": ((1, 3, 2), 0), "one server": ((0, 6, 0), 1)}


@pytest.fixture(scope="module")
def servers(rpc: RpcServer) -> Iterator[tuple[RpcServer, RpcServer]]:
    with rpc_server() as second:
        yield rpc, second


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where: Path = tmp_path_factory.mktemp("split") / "llama.gguf"
    make("llama", where, n_layer=N_LAYER)
    write(where, PLANS)
    return where


def names(servers: Sequence[RpcServer]) -> str:
    return ",".join(server.name for server in servers)


def spread(patch: pytest.MonkeyPatch, counts: Sequence[int], head: int) -> None:
    """Give the processor and the devices so many layers each, and one of them the head."""

    def share(rooms: Sequence[placing.Room], cpu: placing.Room, _d: Devices, _s: Any) -> Any:
        return [cpu, *rooms], list(counts), head

    patch.setattr(placing, "_share", share)


def everything(runtime: Runtime) -> list[Any]:
    """A prompt in chunks, answers that share passes, one that begins alike, and vectors."""
    asks = [{"n": n, "text": n, "max_tokens": 5} for n in (3, 40, 90)]
    found = [ask(runtime, 200), sorted(together(runtime, asks)), ask(runtime, 200, max_tokens=4)]
    vectors = runtime.embed([ids(9, 9), ids(70, 70)]).vectors
    return [*found, vectors.tobytes()]


def played(path: Path, device: str, scenario: Any, **settings: Any) -> Any:
    with Runtime(path, device=device, **SETTINGS | settings) as runtime:
        found = scenario(runtime)
        # A plan's guard computes a text of its own when nobody asks.
        return found, runtime.stats() if "depth" in settings else balanced(runtime)


@pytest.mark.parametrize("how", SPREADS)
def test_answers_batches_and_vectors(
    how: str, path: Path, servers: tuple[RpcServer, RpcServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = played(path, "cpu", everything)[0]
    spread(monkeypatch, *SPREADS[how])
    found, stats = played(path, names(servers), everything)
    assert found == expected
    assert stats["device"] == names(servers)
    counts = [len(each["layers"]) for each in stats["devices"].values()]
    assert counts == list(SPREADS[how][0])
    assert sorted(il for each in stats["devices"].values() for il in each["layers"]) == list(
        range(N_LAYER)
    )
    for each in stats["devices"].values():
        assert each["used_bytes"] == sum(each["entries"].values()) <= each["budget_bytes"]
    assert stats["memory"] == stats["devices"]["CPU"]["entries"]


def test_lookup_drafts(
    path: Path, servers: tuple[RpcServer, RpcServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several tokens in a pass, several of which get logits."""
    prompt = ids(12, 1) * 8
    settings = {"speculate": "lookup", "max_batch": 16, "kv_type": "q8_0"}

    def scenario(runtime: Runtime) -> Any:
        return runtime.generate(prompt_ids=prompt, max_tokens=40).token_ids

    expected, _ = played(path, "cpu", scenario, **settings)
    spread(monkeypatch, *SPREADS["head here"])
    found, stats = played(path, names(servers), scenario, **settings)
    assert found == expected
    assert stats["speculation"]


@pytest.mark.parametrize("name", ["half", "liar"])
def test_depth_plans_with_stand_ins_and_repeats(
    name: str, path: Path, servers: tuple[RpcServer, RpcServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = played(path, "cpu", lambda r: ask(r, 60), depth=name)
    spread(monkeypatch, *SPREADS["thirds"])
    found, stats = played(path, names(servers), lambda r: ask(r, 60), depth=name)
    assert found == expected
    held = [each for each in stats["devices"].values() if "stand-ins" in each["entries"]]
    assert len(held) == (name == "half")


def test_adapters_and_more_of_them_later(
    path: Path, servers: tuple[RpcServer, RpcServer], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    first = adapter_lab.make(tmp_path / "one", path, rank=4, seed=1)
    later = adapter_lab.make(tmp_path / "two.gguf", path, rank=4, seed=2)

    def scenario(runtime: Runtime) -> Any:
        found = [ask(runtime, adapter="one"), ask(runtime)]
        runtime.add_adapter(later)
        asks = [{"adapter": {"one": 0.5, "two": 0.5}}, {"adapter": "two"}, {}]
        return found, sorted(together(runtime, asks)), ask(runtime, adapter="auto")

    settings = {"adapters": [first], "adapter_state": "off", "adapter_slots": 2}
    expected, _ = played(path, "cpu", scenario, **settings)
    assert expected[0][0] != expected[0][1]
    spread(monkeypatch, *SPREADS["thirds"])
    found, stats = played(path, names(servers), scenario, **settings)
    assert found == expected
    slots = [each["entries"]["adapter slots"] for each in stats["devices"].values()]
    assert len(slots) == 3 and min(slots) > 0


def test_sessions_go_on_wherever_their_cells_are(
    path: Path, servers: tuple[RpcServer, RpcServer], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    prompt = ids(200, 3)
    longer = [*prompt, *ids(9, 4)]
    expected, _ = played(path, "cpu", lambda r: [
        r.generate(prompt_ids=each, max_tokens=6).token_ids for each in (prompt, longer)
    ])  # fmt: skip
    spread(monkeypatch, *SPREADS["thirds"])
    settings = SETTINGS | {"device": names(servers), "sessions": str(tmp_path)}
    found = []
    for each in (prompt, longer):
        with Runtime(path, **settings) as runtime:
            answer = runtime.generate(prompt_ids=each, max_tokens=6, session="it")
            found.append(answer.token_ids)
            settled(runtime)
    assert found == expected and answer.stats.n_cached >= 192


def test_a_model_with_experts_that_fits_is_split_too(
    servers: tuple[RpcServer, RpcServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("qwen3moe", tmp_path / "m.gguf", n_layer=3)
    expected, _ = played(tmp_path / "m.gguf", "cpu", lambda r: ask(r, 100, max_tokens=6))
    spread(monkeypatch, (0, 1, 2), 2)
    found, stats = played(
        tmp_path / "m.gguf", names(servers), lambda r: ask(r, 100, max_tokens=6)
    )  # fmt: skip
    assert found == expected
    assert "experts" not in stats


def test_what_fits_no_server_goes_to_the_processor(
    path: Path, servers: tuple[RpcServer, RpcServer]
) -> None:
    """The head and the last layers are on devices; what is left is the processor's."""
    expected, alone = played(path, "cpu", lambda r: ask(r))
    share = alone["memory_bytes"] // 3
    found, stats = played(path, names(servers), lambda r: ask(r), device_memory=share)
    assert found == expected
    here, *there = [each["layers"] for each in stats["devices"].values()]
    assert here == list(range(len(here))) and here and all(there)
    assert all(each["budget_bytes"] == share for each in list(stats["devices"].values())[1:])
    with pytest.raises(
        CapacityError, match=r"(?s)CPU: .* layers.*rpc:127.*raise memory"
    ) as refused:
        played(path, names(servers), ask, device_memory=share, memory="3MiB")
    assert all(server.name in str(refused.value) for server in servers)
    with pytest.raises(CapacityError, match=r"rpc:127.0.0.1:\d+ has .* to use, and one layer"):
        played(path, servers[0].name, ask, device_memory="1MiB")


@pytest.mark.parametrize("fails", ["planning", "allocating", "not"])
def test_what_auto_chose_is_left_where_it_has_no_room(
    fails: str, path: Path, rpc: RpcServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = played(path, "cpu", ask)
    monkeypatch.setattr("edgeroute.device_choice.choose", lambda _params, _file: (rpc.name,))
    settings: dict[str, Any] = {"device_memory": "1MiB"} if fails == "planning" else {}
    allocate, n = Device.allocate, [0]

    def fail(device: Device, *args: Any) -> Any:
        n[0] += device.link is not None
        if n[0] > 2 and device.link is not None:
            raise CapacityError(f"device {device.info.name} is full")
        return allocate(device, *args)

    if fails == "allocating":
        monkeypatch.setattr(Device, "allocate", fail)
    found, stats = played(path, "auto", ask, **settings)
    assert found == expected
    assert stats["device"] == (rpc.name if fails == "not" else "CPU")
    assert list(stats["devices"]) == (["CPU", rpc.name] if fails == "not" else ["CPU"])
    told = [each for each in stats["warnings"] if "the processor computes" in each]
    assert len(told) == (fails != "not") and all(rpc.name in each for each in told)


@pytest.mark.parametrize("n", [1, N_LAYER])
def test_layers_whose_operations_a_device_lacks_are_computed_here(
    n: int, path: Path, rpc: RpcServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said loudly; a device that can do nothing is left alone."""
    expected, _ = played(path, "cpu", ask)
    lacking = {2: {"ROPE", "GET_ROWS"}} if n == 1 else {il: {"ROPE"} for il in range(n + 1)}
    monkeypatch.setattr(placing, "_lacking", lambda *_: lacking)
    found, stats = played(path, rpc.name, ask)
    assert found == expected
    assert stats["devices"]["CPU"]["layers"] == ([2] if n == 1 else list(range(n)))
    assert stats["device"] == (rpc.name if n == 1 else "CPU")
    (told,) = [each for each in stats["warnings"] if "LACKS OPERATIONS" in each]
    assert "ROPE" in told and f"computes {n} of the {N_LAYER} layers" in told


def test_memory_that_a_device_shares_with_the_machine_is_counted_once(
    path: Path, rpc: RpcServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Device._open_rpc.__func__  # type: ignore[attr-defined]

    def unified(cls: type[Device], name: str) -> Device:
        device: Device = opened(cls, name)
        device.info = replace(device.info, unified=True)
        return device

    monkeypatch.setattr(Device, "_open_rpc", classmethod(unified))
    _, stats = played(path, rpc.name, ask, memory="64MiB")
    there, here = stats["devices"][rpc.name], stats["devices"]["CPU"]
    assert there["budget_bytes"] <= 64 << 20
    planned = here["entries"][f"on {rpc.name}, which shares this memory"]
    assert there["used_bytes"] <= planned <= 64 << 20
    with pytest.raises(CapacityError, match="and one layer with its keys"):
        played(path, rpc.name, ask, memory="1MiB")


def test_nothing_leaks_wherever_memory_ends(
    path: Path, servers: tuple[RpcServer, RpcServer], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Weights, keys, stand-ins, what layers hand on, adapter slots: each of them on each device."""
    adapter = adapter_lab.make(tmp_path / "one", path, rank=4, seed=1)
    spread(monkeypatch, *SPREADS["thirds"])
    settings = SETTINGS | {"adapters": [adapter], "adapter_state": "off", "depth": "half"}
    live: set[int] = set()
    left, allocate = [0], Device.allocate

    def counted(device: Device, n_bytes: int, buffer_type: int | None = None) -> Any:
        if device.link is not None:
            left[0] -= 1
            if left[0] < 0:
                raise CapacityError(f"device {device.info.name} could not allocate {n_bytes}")
        buffer = allocate(device, n_bytes, buffer_type)
        free = buffer.free
        live.add(buffer.pointer)

        def freed() -> None:
            live.discard(buffer.pointer)
            free()

        buffer.free = freed
        return buffer

    monkeypatch.setattr(Device, "allocate", counted)
    n_refused = 0
    for n in range(40):
        left[0] = n
        try:
            with Runtime(path, device=names(servers), **settings) as runtime:
                ask(runtime, 3, max_tokens=1)
        except CapacityError as error:
            n_refused += 1
            assert "device rpc:127.0.0.1" in str(error)
        else:
            break
        finally:
            assert not live, f"after {n} allocations"
    assert n_refused >= 8 and n_refused == n


def test_a_server_that_has_less_than_it_said(
    path: Path, servers: tuple[RpcServer, RpcServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by name where its memory ends; nothing stays there, and it can be used again."""
    _, stats = played(path, servers[0].name, lambda r: ask(r, 30))
    parts = stats["devices"][servers[0].name]["entries"]
    most = parts["weights"] + parts["KV cache"] + parts["compute buffer"] // 2
    with rpc_server(memory=most) as small:
        before = free_bytes(small)
        with monkeypatch.context() as patch:
            patch.setattr(placing, "device_budget", lambda *_: 1 << 40)
            for n_kv, where in ((2048, "compute buffer"), (32768, "could not allocate")):
                with pytest.raises(CapacityError, match=f"{small.name}.*{where}"):
                    played(path, small.name, ask, n_kv=n_kv)
                assert free_bytes(small) == before
        with Runtime(path, device=small.name, **SETTINGS | {"n_kv": 512}) as runtime:
            assert ask(runtime, 30)[2] == "length"
            assert free_bytes_of(runtime) < before
        assert free_bytes(small) == before


def test_a_buffer_that_grows_beyond_what_there_is(
    path: Path, servers: tuple[RpcServer, RpcServer], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One answer fails, with numbers; those after it do not."""
    adapters = [adapter_lab.make(tmp_path / f"{i}", path, rank=64, seed=i) for i in range(3)]
    mixture = {"0": 0.5, "1": 0.2, "2": 0.3}
    spread(monkeypatch, *SPREADS["thirds"])
    settings = SETTINGS | {"adapters": adapters, "adapter_state": "off"}
    with Runtime(path, device=names(servers), **settings) as runtime:
        ledger = runtime._loaded.ledgers[servers[1].name]
        given, ledger.budget_bytes = ledger.budget_bytes, ledger.used_bytes + 64
        with pytest.raises(CapacityError, match=rf"on {servers[1].name}, compute buffer .* over"):
            ask(runtime, 200, adapter=mixture)
        assert ledger.used_bytes <= ledger.budget_bytes
        plain = ask(runtime, 30)
        ledger.budget_bytes = given
        assert ask(runtime, 200, adapter=mixture)[2] == "length"
        assert ask(runtime, 30) == plain
        balanced(runtime)


def free_bytes(server: RpcServer) -> int:
    with Device.open(server.name) as device:
        return device.memory()[0]


def free_bytes_of(runtime: Runtime) -> int:
    return runtime._loaded.devices.accelerators[0].memory()[0]


def test_names_of_devices(path: Path, rpc: RpcServer) -> None:
    for wrong, match in (
        (f"{rpc.name},{rpc.name}", "one device"), (f"{rpc.name},,cpu", "names of devices"),
        ("auto,cpu", "give it alone"), (f"{rpc.name},cuda17", "ggml offers: CPU"),
        ("cpu,cpu", "one device"), ("", "names of devices"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=match):
            Runtime(path, device=wrong, **SETTINGS)


def test_the_default_model_over_two_servers_that_could_not_hold_it(
    smollm2: Runtime, smollm2_path: Path
) -> None:
    n_bytes = smollm2_path.stat().st_size
    memory = int(0.85 * n_bytes)
    prompt = "Why is the sky blue?"
    settings: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 64, "threads": 1}
    expected = smollm2.generate(prompt, max_tokens=8).token_ids
    with rpc_server(memory=memory) as first, rpc_server(memory=memory) as second:
        with pytest.raises(CapacityError, match="raise memory"):
            Runtime(smollm2_path, device=first.name, memory="8MiB", **settings)
        both = f"{first.name},{second.name}"
        with Runtime(smollm2_path, device=both, memory="8MiB", **settings) as runtime:
            assert runtime.generate(prompt, max_tokens=8).token_ids == expected
            devices: Any = runtime.stats()["devices"]
            # Which server has how many goes by their measured speeds; one may have the head alone.
            assert not next(iter(devices.values()))["layers"]
            assert all(each["used_bytes"] <= memory for each in list(devices.values())[1:])
            assert np.sum([len(each["layers"]) for each in devices.values()]) == 30
