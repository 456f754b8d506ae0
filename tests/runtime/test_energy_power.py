"""Sensors of watts: a Jetson's rails by both drivers, tegrastats, a battery; and the sampling."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeroute.runtime.energy import EnergyMeter
from edgeroute.runtime.energy_power import (
    HWMON,
    I2C,
    SUPPLIES,
    Integral,
    Sampled,
    Tegrastats,
    battery_watts,
    jetson_rails,
    open_battery,
    open_jetson,
    parse_tegrastats,
    total_watts,
)

ORIN = (
    "11-22-2026 10:00:00 RAM 2945/7620MB (lfb 4x4MB) SWAP 0/3810MB (cached 0MB) CPU [2%@729,"
    "off,off,1%@729] GR3D_FREQ 0% cpu@43.4C gpu@44C VDD_IN 4996mW/4900mW VDD_CPU_GPU_CV "
    "1088mW/1000mW VDD_SOC 1415mW/1400mW"
)
NANO = "RAM 1903/3964MB (lfb 2x1MB) SWAP 0/1982MB IRAM 0/252kB PLL@23C POM_5V_IN 2532/2698 " \
       "POM_5V_GPU 0/40 POM_5V_CPU 325/400"  # fmt: skip
AGX = "RAM 1/2MB VDD_GPU_SOC 2000mW/1mW VDD_CPU_CV 500mW/1mW VIN_SYS_5V0 1500mW/1mW"


def files(folder: Path, **content: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        (folder / name).write_text(f"{text}\n")
    return folder


def orin(root: Path) -> Path:
    """Make the rails of an Orin Nano under JetPack 5."""
    files(root / HWMON / "hwmon0", name="coretemp", in1_label="VDD_IN", in1_input=1, curr1_input=1)
    return files(
        root / HWMON / "hwmon3", name="ina3221", in1_label="VDD_IN", in1_input=5000,
        curr1_input=1200, in2_label="VDD_CPU_GPU_CV", in2_input=5000, curr2_input=400,
        in3_label="VDD_SOC", in3_input=5000, curr3_input=300, in7_label="sum of shunt voltages",
        in7_input=77, curr4_input=1900,
    )  # fmt: skip


def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.002)
    raise AssertionError("it never happened")


def test_the_rail_that_feeds_all_others_counts_alone(tmp_path: Path) -> None:
    orin(tmp_path)
    (rail,) = jetson_rails(tmp_path)
    assert rail.name == "VDD_IN"
    assert rail.watts() == pytest.approx(6.0)


def test_rails_are_summed_where_none_feeds_the_others(tmp_path: Path) -> None:
    """An AGX Orin has two chips, and a channel that nothing is connected to."""
    for i, names in enumerate((("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), ("NC", "VDDQ_X", ""))):
        files(tmp_path / HWMON / f"hwmon{i}", name="ina3221")
        for n, name in enumerate(names, 1):
            rail = {f"in{n}_label": name, f"in{n}_input": 1000, f"curr{n}_input": 1000 << n}
            files(tmp_path / HWMON / f"hwmon{i}", **rail)
    found = {rail.name: rail.watts() for rail in jetson_rails(tmp_path)}
    assert found == {"VDD_GPU_SOC": 2, "VDD_CPU_CV": 4, "VIN_SYS_5V0": 8, "VDDQ_X": 4}


def test_the_older_driver_tells_milliwatts(tmp_path: Path) -> None:
    files(tmp_path / I2C / "ina3221x/6-0040/iio:device0", rail_name_0="POM_5V_IN",
          in_power0_input=2532, rail_name_1="POM_5V_GPU", in_power1_input=40)  # fmt: skip
    (rail,) = jetson_rails(tmp_path)
    assert (rail.name, rail.watts()) == ("POM_5V_IN", pytest.approx(2.532))


def test_rails_are_found_below_the_driver_too(tmp_path: Path) -> None:
    files(tmp_path / I2C / "ina3221/1-0040/hwmon/hwmon3", in1_label="VDD_IN", in1_input=5000,
          curr1_input=1000)  # fmt: skip
    assert [rail.name for rail in jetson_rails(tmp_path)] == ["VDD_IN"]


@pytest.mark.parametrize("text", ["", "x", "-", "\x00", "9" * 50])
def test_rails_of_garbage_are_none(tmp_path: Path, text: str) -> None:
    chip = orin(tmp_path)
    for name in ("curr1_input", "curr2_input", "in3_input"):
        (chip / name).write_text(text)
    assert jetson_rails(tmp_path) == []
    assert open_jetson(tmp_path) is None


def test_a_line_of_tegrastats_tells_rails_and_no_memory() -> None:
    assert parse_tegrastats(ORIN) == {"VDD_IN": 4.996, "VDD_CPU_GPU_CV": 1.088, "VDD_SOC": 1.415}
    assert parse_tegrastats(NANO)["POM_5V_IN"] == 2.532
    assert total_watts(parse_tegrastats(ORIN)) == 4.996
    assert total_watts(parse_tegrastats(NANO)) == 2.532
    assert total_watts(parse_tegrastats(AGX)) == pytest.approx(4.0)
    for line in ("", "VDD_IN", "RAM 1/2MB VDD_IN /", "\x00" * 99, "VDD_IN 9999999mW/1mW"):
        assert parse_tegrastats(line) == {} and total_watts({}) is None


def test_joules_are_the_area_under_the_watts() -> None:
    now = [0.0]
    integral = Integral(lambda: now[0])
    assert integral.joules() == 0
    for at, watts in ((1.0, 2.0), (2.0, 4.0), (4.0, 4.0)):
        now[0] = at
        integral.add(watts)
    assert integral.joules() == pytest.approx(3 + 8)
    now[0] = 5.0
    assert integral.joules() == pytest.approx(15)  # the last watts last
    integral.pause()
    now[0] = 100.0
    assert integral.joules() == pytest.approx(15)
    integral.add(1.0)
    now[0] = 101.0
    assert integral.joules() == pytest.approx(16)


def test_a_sampling_thread_ends_with_its_sensor() -> None:
    watts: list[float | None] = [5.0]
    sensor = Sampled("x", "y", lambda: watts[0], period_s=0.001)
    until(lambda: (sensor.joules() or 0) > 0)
    watts[0] = None
    until(lambda: sensor.joules() is None)
    sensor.close()
    sensor.close()
    assert not any(each.name == "edgeroute-energy" for each in threading.enumerate())


@pytest.mark.parametrize("garbage", [-1.0, 1e9, float("nan")])
def test_watts_that_cannot_be_are_none(garbage: float) -> None:
    sensor = Sampled("x", "y", lambda: garbage)
    assert sensor.joules() is None
    sensor.close()


def test_nothing_is_sampled_while_nobody_asks() -> None:
    n_read = [0]

    def watts() -> float:
        n_read[0] += 1
        return 5.0

    sensor = Sampled("x", "y", watts, period_s=0.001, rest_s=0.01)
    with contextlib.closing(sensor):
        until(lambda: sensor.resting)
        before = n_read[0]
        time.sleep(0.02)
        assert n_read[0] == before and sensor.resting
        assert sensor.joules() is not None
        until(lambda: n_read[0] > before)
        until(lambda: sensor.resting)
        rested = sensor.joules()
    assert sensor.joules() == rested  # what was counted stays


def test_a_jetson_is_sampled_where_all_is_asked_for(tmp_path: Path) -> None:
    chip = orin(tmp_path)
    with EnergyMeter.open("all", root=tmp_path) as meter:
        assert (meter.source, meter.estimated) == ("jetson", False)
        assert meter.scope == "board (VDD_IN), all processes"
        until(lambda: meter.joules() > 0)
        before = meter.joules()
        (chip / "curr1_input").unlink()
        until(lambda: meter.joules() >= before and meter.estimated)
    assert not any(each.name == "edgeroute-energy" for each in threading.enumerate())


def test_tegrastats_is_read_as_it_prints() -> None:
    code = f"import time\nwhile True:\n print({ORIN!r}, flush=True)\n time.sleep(0.01)"
    sensor = Tegrastats.open((sys.executable, "-c", code))
    assert sensor is not None
    until(lambda: (sensor.joules() or 0) > 0)
    sensor.close()
    assert sensor.joules() is None
    sensor.close()
    ended = Tegrastats.open((sys.executable, "-c", ""))
    assert ended is not None
    until(lambda: ended.joules() is None)
    ended.close()
    assert Tegrastats.open(("no-such-program-as-this",)) is None


def test_a_battery_tells_what_the_machine_draws(tmp_path: Path) -> None:
    root = tmp_path / SUPPLIES
    assert battery_watts(tmp_path) is None
    files(root / "AC", type="Mains", online=0)
    files(root / "mouse", type="Battery", scope="Device", status="Discharging", power_now=10**9)
    bat = files(root / "BAT0", type="Battery", status="Discharging", power_now=7_500_000)
    files(root / "BAT1", type="Battery", status="Discharging", current_now=-500_000,
          voltage_now=12_000_000)  # fmt: skip
    assert battery_watts(tmp_path) == pytest.approx(7.5 + 6.0)
    with EnergyMeter.open("all", root=tmp_path) as meter:
        assert meter.source == "battery"
    (bat / "power_now").write_text("?")
    assert battery_watts(tmp_path) is None
    for each in ("BAT0", "BAT1"):
        (root / each / "status").write_text("Charging")
    assert battery_watts(tmp_path) is None and open_battery(tmp_path) is None
