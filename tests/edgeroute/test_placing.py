"""What goes where, worked out from bytes and seconds alone."""

import types
from typing import Any

import pytest

from edgeroute import placing
from edgeroute.config import RunParams
from edgeroute.devices_open import open_devices
from edgeroute.placing import Room, Sizes, device_budget
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError, UsageError

N_LAYER = 10


class Fake:
    """A device of which only name and memory are asked."""

    def __init__(self, name: str, free: int, total: int) -> None:
        self.info = types.SimpleNamespace(name=name, unified=False)
        self.memory = lambda: (free, total)


def device(name: str, free: int = 0, total: int = 0) -> Any:
    return Fake(name, free, total)


def room(
    name: str, budget: int, *, layer: int = 10, lacking: frozenset[int] = frozenset(), **sizes: Any
) -> Room:
    of_layer = sizes.get("layers", (layer,) * N_LAYER)
    each = Sizes(layers=of_layer, head=sizes.get("head", 25), fixed=sizes.get("fixed", 5))
    return Room(device=device(name), sizes=each, budget_bytes=budget, lacking=lacking)


def share(
    patch: pytest.MonkeyPatch, rooms: list[Room], *, cpu: int = 1000, shares: bool = False,
    seconds: dict[str, tuple[float, float]] | None = None,
) -> tuple[list[str], list[int], str]:  # fmt: skip
    """Share layers out: the devices in order, their layers, and whose the head is."""
    asked: list[str] = []

    def speeds(measured: Any, _source: Any) -> dict[Any, tuple[float, float]]:
        asked.extend(each.device.info.name for each in measured)
        return {each.device: (seconds or {})[each.device.info.name] for each in measured}

    patch.setattr(placing, "_speeds", speeds)
    source = types.SimpleNamespace(hparams=types.SimpleNamespace(n_layer=N_LAYER))
    devices: Any = types.SimpleNamespace(cpu_shares=shares)
    order, counts, head = placing._share(rooms, room("CPU", cpu), devices, source)  # type: ignore[arg-type]
    assert bool(asked) == bool(seconds), "measured though it decides nothing, or not though it does"
    return [each.device.info.name for each in order], counts, order[head].device.info.name


def test_one_device_with_room_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert share(monkeypatch, [room("a", 200)]) == (["CPU", "a"], [0, 10], "a")


def test_full_devices_leave_the_first_layers_to_the_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first in the list has the head behind the last layers, 55 - 25 - 5 for two of them."""
    found = share(monkeypatch, [room("a", 55), room("b", 37)])
    assert found == (["CPU", "b", "a"], [5, 3, 2], "a")


def test_layers_are_counted_by_their_own_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones at the beginning do not keep small ones at the end away."""
    layers = (40,) * 5 + (10,) * 5
    found = share(monkeypatch, [room("a", 82, layers=layers)])
    assert found == (["CPU", "a"], [5, 5], "a")


def test_no_room_for_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    found = share(monkeypatch, [room("a", 39), room("b", 38)])
    assert found == (["CPU", "a", "b"], [4, 3, 3], "CPU")


def test_the_quickest_device_is_filled_first_and_has_the_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rooms = [room("a", 100), room("b", 100), room("c", 85)]
    seconds = {"a": (3.0, 0.0), "b": (1.0, 0.0), "c": (2.0, 0.0)}
    found = share(monkeypatch, rooms, seconds=seconds)
    assert found == (["CPU", "a", "c", "b"], [0, 0, 3, 7], "b")


def test_a_device_is_not_entered_for_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = [room("a", 100), room("b", 200)]
    seconds = {"a": (1.0, 20.0), "b": (2.0, 0.0)}
    order, counts, _ = share(monkeypatch, rooms, seconds=seconds)
    assert dict(zip(order, counts, strict=True))["b"] == 10


def test_a_processor_that_was_named_takes_what_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"a": (2.0, 1.0), "CPU": (1.0, 0.0)}
    found = share(monkeypatch, [room("a", 200)], shares=True, seconds=seconds, cpu=90)
    assert found == (["CPU", "a"], [6, 4], "CPU")


def test_layers_that_a_device_cannot_compute_are_the_processors() -> None:
    cpu, a = room("CPU", 1000), room("a", 200, lacking=frozenset({4, 9}))
    placed = placing._placement([cpu, a], [1, 9], 1, cpu.device)
    names = [placed.device(il).info.name for il in range(N_LAYER + 1)]
    assert names == ["CPU", "a", "a", "a", "CPU", "a", "a", "a", "a", "CPU", "a"]
    assert list(placed.stretches())[1] == (1, range(1, 4))
    assert not room("a", 200, lacking=frozenset({N_LAYER})).n_layers(head=True)


def test_what_fits_nowhere_is_refused_with_the_numbers_of_each() -> None:
    cpu, a = room("CPU", 60), room("a", 55)
    placed = placing._placement([cpu, a], [8, 2], 1, cpu.device)
    match = r"CPU: 8 of 10 layers, 85 B of 60 B; a: 2 of 10 layers and the head, 50 B of 55 B"
    with pytest.raises(CapacityError, match=match):
        placing._check_fits([cpu, a], placed)
    placing._check_fits([room("CPU", 85), a], placed)


@pytest.mark.parametrize(
    ("free", "given", "held", "expected"),
    [(1000, None, 0, 950), (1000, 500, 0, 500), (1000, 5000, 0, 950), (900, None, 100, 950)],
)
def test_what_may_be_used_of_a_device(
    free: int, given: int | None, held: int, expected: int
) -> None:
    params = RunParams(device_memory=given)
    assert device_budget(device("a", free, 2000), params, held) == expected


def test_a_device_that_does_not_know_its_memory() -> None:
    with pytest.raises(UsageError, match="say by device_memory"):
        device_budget(device("a"), RunParams())
    assert device_budget(device("a"), RunParams(device_memory="1MiB")) == 1 << 20


@pytest.mark.parametrize("text", ["a,,b", ",", " ", "a,b,", ",".join("abcdefghijklmnopq")])
def test_lists_of_devices_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="1 to 16 names"):
        open_devices(RunParams(device=text), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["cpu,CPU", "cuda0, cuda0", "rpc:h:1,RPC:H:1"])
def test_one_device_named_twice(text: str) -> None:
    with pytest.raises(UsageError, match="one device"):
        open_devices(RunParams(device=text), None)  # type: ignore[arg-type]


def test_one_device_under_two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened devices are closed again."""
    monkeypatch.setattr(Device, "is_cpu", property(lambda _: False))
    opened: list[Device] = []
    really = Device.open.__func__  # type: ignore[attr-defined]

    def record(cls: Any, name: str) -> Device:
        opened.append(really(cls, "cpu"))
        return opened[-1]

    monkeypatch.setattr(Device, "open", classmethod(record))
    with pytest.raises(UsageError, match="gpu and cuda0 are one device"):
        open_devices(RunParams(device="gpu,cuda0"), None)  # type: ignore[arg-type]
    assert len(opened) == 3 and not any(each._backend for each in opened)


def test_what_is_no_text_names_no_device() -> None:
    with pytest.raises(UsageError, match="must be text"):
        open_devices(RunParams(device=5), None)  # type: ignore[arg-type]


def test_the_processor_alone_is_what_it_always_was() -> None:
    with open_devices(RunParams(device=" CPU "), None) as devices:  # type: ignore[arg-type]
        assert devices.face is devices.cpu and devices.all == (devices.cpu,)
