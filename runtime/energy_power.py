"""Sensors that tell watts, not joules: a Jetson's power rails and a battery.

They are sampled ten times a second by a thread of its own and summed up. The thread rests where
nobody has asked for joules for a while, and ends at `close`.
"""

import contextlib
import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from edgeroute.runtime.energy_sensors import read_number, read_text

PERIOD_S: Final = 0.1
REST_S: Final = 2.0
"""Without a question, after which nothing is sampled."""
MAX_WATTS: Final = 1000.0
"""Of a board or a battery; more is garbage."""
TOTALS: Final = ("VDD_IN", "POM_5V_IN", "VIN")
"""Rails that feed all others, by what different boards call them."""
MAX_LINE: Final = 8192
TEGRASTATS: Final = ("tegrastats", "--interval", "100")
JETSON: Final = "jetson"
HWMON: Final = "sys/class/hwmon"
I2C: Final = "sys/bus/i2c/drivers"
SUPPLIES: Final = "sys/class/power_supply"
_RAIL: Final = re.compile(
    r"\b((?:VDD|VDDQ|VIN|POM)(?:_[A-Z0-9]+)*) (\d{1,7})(?:mW)?/\d{1,7}(?!M|k)"
)


class Integral:
    """Joules from watts at points in time, by the trapezoidal rule. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._joules = 0.0
        self._watts: float | None = None
        self._at = 0.0

    def add(self, watts: float) -> None:
        """Enter the watts of now."""
        with self._lock:
            now = self._clock()
            if self._watts is not None:
                self._joules += 0.5 * (self._watts + watts) * max(0.0, now - self._at)
            self._watts, self._at = watts, now

    def pause(self) -> None:
        """Count nothing until the next watts."""
        with self._lock:
            self._joules = self._sum()
            self._watts = None

    def joules(self) -> float:
        """Return joules so far, the last watts lasting until now."""
        with self._lock:
            return self._sum()

    def _sum(self) -> float:
        if self._watts is None:
            return self._joules
        return self._joules + self._watts * max(0.0, self._clock() - self._at)


class Sampled:
    """Joules of a sensor of watts. A Counter.

    Args:
        source, scope: what is told of it.
        watts: reads it; None: it cannot be read any more.
        period_s: between two readings.
        rest_s: see REST_S.
    """

    estimated: Final = False

    def __init__(
        self, source: str, scope: str, watts: Callable[[], float | None], *,
        period_s: float = PERIOD_S, rest_s: float = REST_S,
    ) -> None:  # fmt: skip
        self.source, self.scope = source, scope
        self._watts, self._period_s, self._rest_s = watts, period_s, rest_s
        self._integral = Integral()
        self._asked = threading.Event()
        self._asked_at = time.monotonic()
        self._closed = threading.Event()
        self._gone = not self._sample()
        self.resting = False
        """Whether nothing is sampled, because nobody asks."""
        self._thread = threading.Thread(target=self._run, name="edgeroute-energy", daemon=True)
        self._thread.start()

    def _sample(self) -> bool:
        watts = self._watts()
        if watts is None or not 0 <= watts <= MAX_WATTS:
            return False
        self._integral.add(watts)
        return True

    def _run(self) -> None:
        while not self._gone and not self._closed.wait(self._period_s):
            if time.monotonic() - self._asked_at > self._rest_s:
                self._integral.pause()
                self._asked.clear()
                self.resting = True
                self._asked.wait()
                self.resting = False
                if self._closed.is_set():
                    return
            self._gone = not self._sample()

    def joules(self) -> float | None:
        """Return joules while it was asked; None where the sensor cannot be read any more."""
        self._asked_at = time.monotonic()
        self._asked.set()
        return None if self._gone else self._integral.joules()

    def close(self) -> None:
        """End the thread; safe to call twice."""
        self._closed.set()
        self._asked.set()
        self._thread.join()


@dataclass(frozen=True, slots=True)
class Rail:
    """A power rail: its name, and files whose numbers (milli-units) multiply to its power."""

    name: str
    factors: tuple[Path, ...]

    def watts(self) -> float | None:
        """Read its power; None where it cannot be read."""
        product = 1.0
        try:
            for path in self.factors:
                value = read_number(path)
                if value is None:
                    return None
                product *= value / 1e3
        except PermissionError:
            return None
        return product


def jetson_rails(root: Path = Path("/")) -> list[Rail]:
    """Find the rails that INA3221 chips measure on a Jetson board, those that count.

    The one that feeds all others where there is one, else all. JetPack 5 and later have them as
    hwmon devices (in1_label, in1_input in mV, curr1_input in mA), JetPack 4 as iio devices of a
    driver of its own (rail_name_0, in_power0_input in mW).

    Source: Jetson Linux Developer Guide, "Power Consumption" (software-based power monitoring);
    Linux, Documentation/hwmon/ina3221.
    """
    found: dict[str, Rail] = {}
    try:
        chips = [each for each in _glob(root / HWMON, "hwmon*")
                 if read_text(each / "name") == "ina3221"]  # fmt: skip
        chips = chips or _glob(root / I2C / "ina3221", "*/hwmon/hwmon*")
        for chip in chips:
            for n in (1, 2, 3):  # others are sums, and voltages of shunts
                factors = (chip / f"in{n}_input", chip / f"curr{n}_input")
                _add(found, read_text(chip / f"in{n}_label"), factors)
        for chip in [] if found else _glob(root / I2C / "ina3221x", "*/iio:device*"):
            for n in (0, 1, 2):
                _add(found, read_text(chip / f"rail_name_{n}"), (chip / f"in_power{n}_input",))
    except PermissionError:
        return []
    whole = [found[name] for name in TOTALS if name in found]
    return whole[:1] or list(found.values())


def _add(found: dict[str, Rail], name: str | None, factors: tuple[Path, ...]) -> None:
    if not name or name == "NC" or not name.isprintable() or name in found:
        return
    rail = Rail(name, factors)
    if rail.watts() is not None:
        found[name] = rail


def _glob(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern)) if folder.is_dir() else []


def sum_of(watts: list[float | None]) -> float | None:
    """Add up readings; None where one of them, or all, are missing."""
    known = [each for each in watts if each is not None]
    return sum(known) if known and len(known) == len(watts) else None


def open_jetson(root: Path = Path("/")) -> Sampled | None:
    """Sample a Jetson's rails; None where there are none."""
    rails = jetson_rails(root)
    if not rails:
        return None
    names = ", ".join(rail.name for rail in rails)
    return Sampled(JETSON, f"board ({names}), all processes",
                   lambda: sum_of([rail.watts() for rail in rails]))  # fmt: skip


def parse_tegrastats(line: str) -> dict[str, float]:
    """Return watts by rail from a line of tegrastats; empty where it names none.

    Rails come as `VDD_IN 4996mW/4900mW` (now/average), before JetPack 5 without the unit.
    """
    found = {name: int(now) / 1e3 for name, now in _RAIL.findall(line[:MAX_LINE])}
    return {name: watts for name, watts in found.items() if watts <= MAX_WATTS}


def total_watts(rails: Mapping[str, float]) -> float | None:
    """Return the watts of the rail that feeds all others, else of all; None: there is none."""
    for name in TOTALS:
        if name in rails:
            return rails[name]
    return sum(rails.values()) if rails else None


class Tegrastats:
    """Joules by what the program tegrastats prints. A Counter."""

    source: Final = JETSON
    estimated: Final = False
    scope: Final = "board (tegrastats), all processes"

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._integral = Integral()
        self._gone = False
        self._thread = threading.Thread(target=self._run, name="edgeroute-energy", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, command: tuple[str, ...] = TEGRASTATS) -> Self | None:
        """Start the program; None where there is none."""
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError:
            return None
        return cls(process)

    def _run(self) -> None:
        output = self._process.stdout
        while output is not None and (line := output.readline(MAX_LINE)):
            watts = total_watts(parse_tegrastats(line.decode("ascii", "replace")))
            if watts is not None:
                self._integral.add(watts)
        self._gone = True

    def joules(self) -> float | None:
        """Return joules since its first line; None where the program has ended."""
        return None if self._gone else self._integral.joules()

    def close(self) -> None:
        """End the program; safe to call twice."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        self._process.wait()
        self._thread.join()
        if self._process.stdout is not None:
            self._process.stdout.close()


def battery_watts(root: Path = Path("/")) -> float | None:
    """Return what the machine draws from its batteries; None where none is being discharged.

    Source: Linux, Documentation/ABI/testing/sysfs-class-power: power_now in uW, current_now in
    uA, voltage_now in uV; `scope` tells batteries of mice from the machine's.
    """
    watts: list[float | None] = []
    try:
        for supply in _glob(root / SUPPLIES, "*"):
            if read_text(supply / "type") != "Battery" or read_text(supply / "scope") == "Device":
                continue
            if read_text(supply / "status") == "Discharging":
                watts.append(_supply_watts(supply))
    except PermissionError:
        return None
    return sum_of(watts)


def _supply_watts(supply: Path) -> float | None:
    power = read_number(supply / "power_now")
    if power is not None:
        return abs(power) / 1e6
    current, voltage = read_number(supply / "current_now"), read_number(supply / "voltage_now")
    if current is None or voltage is None:
        return None
    return abs(current) * abs(voltage) / 1e12


def open_battery(root: Path = Path("/")) -> Sampled | None:
    """Sample the battery that the machine runs on; None where it does not run on one."""
    if battery_watts(root) is None:
        return None
    return Sampled("battery", "machine on battery, all processes", lambda: battery_watts(root))
