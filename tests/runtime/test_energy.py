"""Which counter of energy is taken, and what becomes of one that turns over, lies or goes away."""

from pathlib import Path
from typing import Any

import pytest

from edgeroute.runtime import energy_model, energy_sensors
from edgeroute.runtime.energy import NO_SAMPLING, EnergyMeter
from edgeroute.runtime.energy_model import (
    EnergyModel,
    Estimate,
    Used,
    check_energy,
    disk_bytes,
    model_here,
    model_of_device,
)
from edgeroute.runtime.energy_sensors import REMEDY, Nvml, Rapl
from edgeroute.runtime.errors import UsageError

MODEL = EnergyModel(core_watts=5.0, read_j_byte=1e-3, origin="a test")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def zone(root: Path, folder: str, name: str, uj: int | str, most: int | str = 10**9) -> Path:
    """Make a powercap zone; return its counter."""
    path = root / energy_sensors.RAPL / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{most}\n")
    (path / "energy_uj").write_text(f"{uj}\n")
    return path / "energy_uj"


def rapl(root: Path, clock: Clock) -> Rapl:
    found = Rapl.open(root, clock)
    assert isinstance(found, Rapl)
    return found


# RAPL


def test_packages_and_their_memory_are_summed_once(tmp_path: Path) -> None:
    """Cores are inside the package; the same package also shows up through another interface."""
    clock = Clock()
    counters = [
        zone(tmp_path, "intel-rapl:0", "package-0", 0),
        zone(tmp_path, "intel-rapl:1", "package-1", 0),
        zone(tmp_path, "intel-rapl:0:2", "dram", 0),
        zone(tmp_path, "intel-rapl:0:0", "core", 0),
        zone(tmp_path, "intel-rapl:2", "psys", 0),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0),
    ]
    found = rapl(tmp_path, clock)
    assert found.joules() == 0 and found.scope == "package and memory, all processes"
    for i, path in enumerate(counters):
        path.write_text(str(10**6 << i))
    clock.now += 1
    assert found.joules() == pytest.approx(1 + 2 + 4)


def test_a_counter_that_turns_over_goes_on(tmp_path: Path) -> None:
    clock, path = Clock(), zone(tmp_path, "intel-rapl:0", "package-0", 999_000_000)
    found = rapl(tmp_path, clock)
    path.write_text("2000000")
    clock.now += 1
    assert found.joules() == pytest.approx(3.0)
    assert found.scope == "package, all processes"


@pytest.mark.parametrize(("most", "now"), [("huh", 5), (10, 5), (10**18, 10**17)])
def test_a_counter_that_was_set_back_or_jumps_adds_nothing(
    tmp_path: Path, most: int | str, now: int
) -> None:
    """After sleep it may begin anew: that is no turn of the counter, which none would survive."""
    clock, path = Clock(), zone(tmp_path, "intel-rapl:0", "package-0", 500_000_000, most)
    found = rapl(tmp_path, clock)
    path.write_text(str(now))
    clock.now += 1
    assert found.joules() == 0
    path.write_text(str(now + 2_000_000))
    clock.now += 1
    assert found.joules() == pytest.approx(2.0)


@pytest.mark.parametrize("text", ["", "garbage", "-5", "1e9", "9" * 40, "\x00\xff"])
def test_garbage_ends_a_counter_and_is_no_counter(tmp_path: Path, text: str) -> None:
    clock, path = Clock(), zone(tmp_path, "intel-rapl:0", "package-0", 1)
    found = rapl(tmp_path, clock)
    path.write_text(text)
    assert found.joules() is None
    assert Rapl.open(tmp_path, clock) is None


def test_a_counter_that_is_a_folder_or_gone_is_none(tmp_path: Path) -> None:
    assert Rapl.open(tmp_path) is None
    path = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    found = rapl(tmp_path, Clock())
    path.unlink()
    assert found.joules() is None
    path.mkdir()
    assert Rapl.open(tmp_path) is None


def test_a_counter_for_root_alone_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    found = rapl(tmp_path, Clock())
    real = energy_sensors.os.open

    def guarded(asked: Any, flags: int) -> int:
        if Path(asked) == path:
            raise PermissionError(13, "no")
        return real(asked, flags)

    monkeypatch.setattr(energy_sensors.os, "open", guarded)
    assert Rapl.open(tmp_path) == REMEDY and "chmod" in REMEDY
    assert found.joules() is None
    with EnergyMeter.open(root=tmp_path) as meter:
        assert meter.source == "estimate" and meter.estimated
        assert REMEDY in meter.notes


# NVML


class FakeNvml:
    """What of pynvml is used."""

    class NVMLError(Exception):
        pass

    def __init__(self, millijoules: int | None = 1000, starts: bool = True) -> None:
        self.millijoules, self.starts = millijoules, starts
        self.n_open = 0

    def nvmlInit(self) -> None:
        if not self.starts:
            raise self.NVMLError("driver not loaded")
        self.n_open += 1

    def nvmlShutdown(self) -> None:
        self.n_open -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if self.millijoules is None:
            raise self.NVMLError("not supported")
        return self.millijoules


def test_a_gpu_counts_beside_the_machine(tmp_path: Path) -> None:
    path, library = zone(tmp_path, "intel-rapl:0", "package-0", 0), FakeNvml()
    with EnergyMeter.open(root=tmp_path, gpu=0, nvml=library) as meter:
        assert meter.source == "rapl+nvml" and not meter.estimated
        assert "GPU only" in meter.scope
        path.write_text("1000000")
        library.millijoules = 3500
        assert meter.joules() == pytest.approx(1 + 2.5)
        library.millijoules = None
        assert meter.joules() == pytest.approx(3.5)  # what was counted stays
        assert meter.source == "rapl" and "left out" in meter.notes[-1]
    assert library.n_open == 0


@pytest.mark.parametrize("library", [FakeNvml(starts=False), FakeNvml(millijoules=None)])
def test_a_gpu_that_does_not_tell_is_said(library: FakeNvml, tmp_path: Path) -> None:
    assert isinstance(Nvml.open(0, library), str)
    with EnergyMeter.open(root=tmp_path, gpu=0, nvml=library) as meter:
        assert meter.source == "estimate"
        assert any("GPU's energy is not counted" in note for note in meter.notes)
    assert library.n_open == 0


# the model


def test_the_estimate_is_its_stated_sum() -> None:
    used = {"core": 1.0, "wall": 10.0, "bytes": 500}
    ways = Used(core_s=lambda: used["core"], wall_s=lambda: used["wall"],
                read_bytes=lambda: int(used["bytes"]))  # fmt: skip
    adds = Estimate(MODEL, ways)
    whole = Estimate(model_of_device("board", active_watts=14.0, idle_watts=4.0, cores=4), ways)
    used.update(core=3.0, wall=12.0, bytes=1500)
    assert adds.joules() == pytest.approx(5 * 2 + 1e-3 * 1000)
    assert whole.joules() == pytest.approx(2.5 * 2 + 4 * 2 + 2e-9 * 1000)
    assert (adds.scope, whole.scope) == ("this process, estimated", "the machine, estimated")
    used.update(core=0.0, wall=0.0, bytes=0)
    assert adds.joules() == 0  # a clock that was set back gives nothing back
    assert model_here().core_watts > 0 and "W for a busy core" in MODEL.told


def test_work_is_estimated_here(tmp_path: Path) -> None:
    with EnergyMeter.open("estimate", model=MODEL, root=tmp_path) as meter:
        before = meter.joules()
        sum(i * i for i in range(300_000))
        assert meter.joules() > before >= 0
        assert meter.notes == (MODEL.told,)


def test_bytes_read_are_those_of_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy_model.sys, "platform", "linux")
    assert disk_bytes(tmp_path) == 0
    path = tmp_path / "proc/self/io"
    path.parent.mkdir(parents=True)
    path.write_text("rchar: 9\nwchar: 8\nread_bytes: 12345\nwrite_bytes: 7\n")
    assert disk_bytes(tmp_path) == 12345
    path.write_text("read_bytes: many\n")
    assert disk_bytes(tmp_path) == 0
    monkeypatch.setattr(energy_model.sys, "platform", "darwin")
    assert disk_bytes(tmp_path) == 0


@pytest.mark.parametrize(
    ("how", "mode", "watts"),
    [("auto", "auto", None), ("all", "all", None), ("off", "off", None),
     ("estimate", "estimate", None), ("estimate:3.5", "estimate", 3.5)],
)  # fmt: skip
def test_how_energy_is_asked_for(how: str, mode: str, watts: float | None) -> None:
    found, model = check_energy(how)
    assert found == mode
    assert (None if model is None else model.core_watts) == watts


@pytest.mark.parametrize(
    "how", ["", "on", "auto:3", "estimate:", "estimate:nan", "estimate:-1", "estimate:1e9", 3, None]
)
def test_what_asks_for_nothing_is_refused(how: object) -> None:
    with pytest.raises(UsageError, match="energy must be"):
        check_energy(how)


@pytest.mark.parametrize(
    "watts", [{"active_watts": 3.0, "idle_watts": 4.0, "cores": 4},
              {"active_watts": 3.0, "idle_watts": 1.0, "cores": 0},
              {"active_watts": 1e9, "idle_watts": 1.0, "cores": 1}],
)  # fmt: skip
def test_a_device_of_impossible_watts_is_refused(watts: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        model_of_device("x", **watts)


# the meter


def test_a_counter_that_vanishes_is_replaced_by_the_model_and_nothing_is_lost(
    tmp_path: Path,
) -> None:
    path = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    with EnergyMeter.open(root=tmp_path, model=MODEL) as meter:
        assert (meter.source, meter.estimated, meter.notes) == ("rapl", False, ())
        path.write_text("5000000")
        assert meter.joules() == pytest.approx(5.0)
        path.unlink()
        assert meter.joules() == pytest.approx(5.0)
        assert meter.source == "estimate" and meter.estimated
        assert "rapl does not answer any more" in meter.notes[-1]
        sum(i * i for i in range(300_000))
        assert meter.joules() > 5.0


def test_what_must_be_sampled_is_not_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "sys/bus/i2c/drivers/ina3221").mkdir(parents=True)
    with EnergyMeter.open(root=tmp_path) as meter:
        assert meter.source == "estimate" and NO_SAMPLING in meter.notes
