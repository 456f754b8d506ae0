"""Layers go where a pass takes least time; what that is based on is measured once, and kept."""

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeroute import device_speed
from edgeroute.config import RunParams
from edgeroute.device_speed import (
    NAME,
    DeviceSpeed,
    device_speeds,
    layer_seconds,
    measure,
    place_layers,
)
from edgeroute.device_support import Probe
from edgeroute.loaded import kv_shape
from edgeroute.models.registry import describe
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError, UnsupportedModelError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools.synth import make
from tests.device import fake_backend as fakes

# which layers go where


def cost(chosen: tuple[int, ...], seconds: tuple[float, ...], entering: tuple[float, ...]) -> float:
    return sum(seconds[d] for d in chosen) + sum(entering[d] for d in set(chosen))


def test_no_split_takes_less_time() -> None:
    """Against every way to give five layers to three devices, contiguous or not."""
    rng = np.random.default_rng(3)
    for _ in range(60):
        seconds = tuple(rng.integers(1, 9, 3) / 8)
        entering = tuple(rng.integers(0, 9, 3) / 8)
        rooms = tuple(rng.integers(0, 6, 3).tolist())
        ways = [
            way for way in itertools.product(range(3), repeat=5)
            if all(way.count(d) <= rooms[d] for d in range(3))
        ]  # fmt: skip
        if not ways:
            with pytest.raises(CapacityError):
                place_layers(seconds, rooms, 5, entering)
            continue
        best = min(cost(way, seconds, entering) for way in ways)
        chosen = place_layers(seconds, rooms, 5, entering)
        assert cost(chosen, seconds, entering) == pytest.approx(best)
        assert list(chosen) == sorted(chosen)  # one stretch each, in the order given
        assert all(chosen.count(d) <= rooms[d] for d in range(3))


def test_a_slow_device_gets_only_what_others_have_no_room_for() -> None:
    assert place_layers([0.004, 0.001], [9, 4], 7) == (0, 0, 0, 1, 1, 1, 1)
    assert place_layers([0.001, 0.001], [3, 9], 6) == (0, 0, 0, 1, 1, 1)
    assert place_layers([1.0], [2], 0) == ()


def test_the_way_to_a_device_may_cost_more_than_it_saves() -> None:
    assert place_layers([2.0, 1.0], [9, 3], 4) == (0, 1, 1, 1)
    assert place_layers([2.0, 1.0], [9, 3], 4, [0.0, 3.5]) == (0, 0, 0, 0)


def test_too_little_room_is_refused_with_both_numbers() -> None:
    with pytest.raises(CapacityError, match="room for 5 of 6 layers"):
        place_layers([1.0, 1.0], [2, 3], 6)


# what it is based on


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Probe]]:
    folder, found, files = tmp_path_factory.mktemp("speed"), {}, []
    for arch in ("llama", "deepseek2"):
        make(arch, folder / f"{arch}.gguf")
        files.append(GGUFFile.open(folder / f"{arch}.gguf"))
        model = describe(files[-1])
        kv = kv_shape(model.hparams, RunParams())
        found[arch] = Probe(file=files[-1], model=model, kv=kv, n_ubatch=64)
    yield found
    for file in files:
        file.close()


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(device_speed, "MOST_S", 0.002)
    monkeypatch.setattr(device_speed, "cache_path", lambda name: tmp_path / name)
    return tmp_path / NAME


@pytest.mark.parametrize("arch", ["llama", "deepseek2"])
def test_devices_are_measured_once(arch: str, probes: dict[str, Probe], notes: Path) -> None:
    with fakes.fake_devices(fakes.Fake(), fakes.Fake(asynchronous=False)) as made, \
            Device.open("cpu") as cpu, Device.open("fake0") as first, \
            Device.open("fake1") as second:  # fmt: skip
        found = device_speeds(probes[arch], [cpu, first, second], threads=1)
        assert list(found) == [cpu.info.name, "fake0", "fake1"]
        for speed in found.values():
            assert min(speed.decode_s, speed.prompt_s) > 0 and speed.entering_s >= 0
            assert speed.upload_bytes_s > 0 and speed.download_bytes_s > 0
        before = [each.n_computed for each in made]
        assert device_speeds(probes[arch], [first, second], threads=1) == {
            name: found[name] for name in ("fake0", "fake1")
        }
        assert layer_seconds(probes[arch], [first], threads=1) == {"fake0": found["fake0"].layer_s}
        assert [each.n_computed for each in made] == before
        assert not any(each.n_live or each.n_live_events for each in made)


def test_notes_are_believed_only_as_far_as_they_can_be(
    probes: dict[str, Probe], notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    speed = DeviceSpeed(decode_s=1e-3, prompt_s=1e-4, entering_s=0.0, upload_bytes_s=1e9,
                        download_bytes_s=2e9)  # fmt: skip

    def play(_: Probe, device: Device) -> DeviceSpeed:
        made.append(device.info.name)
        return speed

    monkeypatch.setattr(device_speed, "measure", play)
    with fakes.fake_device(), Device.open("fake0") as device:

        def measured(text: str | None = None, n_threads: int = 1) -> bool:
            if text is not None:
                notes.write_text(text, "utf-8")
            made.clear()
            assert device_speeds(probes["llama"], [device], n_threads) == {"fake0": speed}
            return bool(made)

        assert measured() and not measured()
        good = json.loads(notes.read_text())
        entry = good["entries"][0]
        assert not measured(json.dumps(good), 2)  # its own threads are not the processor's
        old = time.time() - device_speed.VALID_S - 1
        for bad in (
            "", "[]", "{}", "\u00e4", "[" * 90000, json.dumps(good | {"version": 2}),
            json.dumps(good) + " " * (1 << 17), json.dumps(good | {"entries": {}}),
            *[json.dumps(good | {"entries": [each]}) for each in (
                None, entry | {"when": old}, entry | {"when": time.time() + 9999},
                entry | {"when": True}, entry | {"key": 1}, entry | {"more": 1},
                entry | {"speed": []}, entry | {"speed": entry["speed"] | {"decode_s": -1}},
                entry | {"speed": entry["speed"] | {"decode_s": float("nan")}},
                entry | {"speed": {"decode_s": 1.0}},
            )],
        ):  # fmt: skip
            assert measured(bad), bad[:80]
            assert not measured()


def test_a_device_that_cannot_be_measured_says_why(probes: dict[str, Probe], notes: Path) -> None:
    lacks = fakes.Fake(refuses=frozenset(("FLASH_ATTN_EXT", "MUL_MAT")))
    message = r"fake0 can compute no layer.*FLASH_ATTN_EXT with keys of f16"
    with fakes.fake_device(lacks), Device.open("fake0") as device, \
            pytest.raises(UnsupportedModelError, match=message):  # fmt: skip
        measure(probes["llama"], device)
    n_allocated = 0
    while True:  # each allocation fails in turn
        with fakes.fake_device(fakes.Fake(fail_at=n_allocated)) as fake, \
                Device.open("fake0") as device:  # fmt: skip
            try:
                measure(probes["llama"], device)
                break
            except CapacityError as error:
                assert "fake0" in str(error)
            assert not fake.n_live and not fake.n_live_events
        n_allocated += 1
    assert n_allocated >= 4  # weights, KV cells, what layers hand on, what is copied
    assert not notes.exists()


def test_a_small_device_is_asked_for_less(notes: Path) -> None:
    with fakes.fake_device(fakes.Fake(memory_bytes=1 << 20)) as fake, \
            Device.open("fake0") as device:  # fmt: skip
        assert min(device_speed._copies(device)) > 0
        assert not fake.n_live


def test_a_slow_link_is_asked_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for each look at the clock."""
    asked: list[int] = []
    now = iter(range(1000))
    monkeypatch.setattr(device_speed.time, "perf_counter", lambda: float(next(now)))
    assert device_speed._rate(asked.append, 1 << 20) == max(asked)
    assert sum(asked) < 1 << 20


def test_a_quick_link_is_asked_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    now = iter(range(1000))
    monkeypatch.setattr(device_speed.time, "perf_counter", lambda: next(now) * 1e-4)
    assert device_speed._rate(asked.append, 1 << 20) == pytest.approx((1 << 20) / 1e-4)
    assert max(asked) == 1 << 20
