"""What slows a board down now: clock limits, heat, low voltage, a battery, a quota.

Source: Linux Documentation/admin-guide/pm/cpufreq and driver-api/thermal/sysfs-api; NVIDIA
Jetson Linux Developer Guide, "Platform Power and Performance"; Raspberry Pi documentation,
`vcgencmd get_throttled`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from edgeroute.runtime.board_files import Run, Tree

_LIMIT_RATIO: Final = 0.97
"""A limit above this share of what the hardware can do limits nothing."""
_ALERTS: Final = re.compile(r"throttle-alert|hot-surface-alert")
_SLOW_PROFILES: Final = ("low-power", "quiet", "cool")
_PI_NOW: Final = {
    0: (
        "voltage",
        "its supply is below 4.63 V",
        "use a power supply of 5 V and 5 A, and its cable",
    ),
    1: (
        "frequency",
        "the firmware caps its clock",
        "use a power supply of 5 V and 5 A, or cool it",
    ),
    2: ("throttling", "the firmware throttles it", "cool it: a fan or the active cooler"),
    3: (
        "temperature",
        "it is at its soft temperature limit",
        "cool it: a fan or the active cooler",
    ),
}
"""Bits of get_throttled that are set while something happens; 16 higher: it has happened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Clocks of the fastest cores in Hz: now, the most that is allowed, the most there is."""

    current_hz: int
    limit_hz: int
    hardware_hz: int
    governor: str = ""
    driver: str = ""
    preference: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Throttle:
    """Something that slows the machine down: a word, a sentence, and what to do."""

    what: str
    why: str
    remedy: str


def clock_of(tree: Tree) -> Clock | None:
    """Read the clocks of the cores that can go fastest."""
    folders = tree.glob("sys/devices/system/cpu/cpufreq/policy*")
    folders = folders or tree.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq")
    found = [clock for folder in folders if (clock := _read_clock(tree, folder)) is not None]
    return max(found, key=lambda clock: clock.hardware_hz, default=None)


def _read_clock(tree: Tree, folder: str) -> Clock | None:
    khz = [tree.number(f"{folder}/{name}_freq")
           for name in ("scaling_cur", "scaling_max", "cpuinfo_max")]  # fmt: skip
    now, limit, most = (1000 * (value or 0) for value in khz)
    if limit <= 0 or most <= 0:
        return None
    return Clock(
        current_hz=now, limit_hz=limit, hardware_hz=most,
        governor=tree.line(f"{folder}/scaling_governor"),
        driver=tree.line(f"{folder}/scaling_driver"),
        preference=tree.line(f"{folder}/energy_performance_preference"),
    )  # fmt: skip


def throttles_of(
    tree: Tree, run: Run, *, kind: str, clock: Clock | None, battery: bool | None,
    quota: float | None,
) -> tuple[Throttle, ...]:  # fmt: skip
    """List what slows this board down now."""
    found = [*_clock_limits(clock, kind), *_heat(tree)]
    if kind == "raspberry-pi":
        found += _pi(tree, run)
    profile = tree.line("sys/firmware/acpi/platform_profile")
    if profile in _SLOW_PROFILES:
        found.append(Throttle(
            what="platform profile", why=f"the platform's profile is {profile}",
            remedy="powerprofilesctl set performance",
        ))  # fmt: skip
    if battery:
        found.append(Throttle(
            what="battery", why="it runs on battery, where most laptops lower their clocks",
            remedy="plug in the power supply",
        ))  # fmt: skip
    n_cores = len(tree.glob("sys/devices/system/cpu/cpu[0-9]*")) or 1
    if quota is not None and quota < n_cores:
        found.append(Throttle(
            what="CPU quota", why=f"its control group has {quota:g} of {n_cores} cores",
            remedy="raise the quota (systemctl set-property CPUQuota=, docker --cpus)",
        ))  # fmt: skip
    return tuple(found)


def _clock_limits(clock: Clock | None, kind: str) -> Iterator[Throttle]:
    if clock is None:
        return
    if clock.limit_hz < _LIMIT_RATIO * clock.hardware_hz:
        jetson = kind == "jetson"
        yield Throttle(
            what="clock limit",
            why=f"the CPU may go to {clock.limit_hz / 1e9:.2f} GHz of "
                f"{clock.hardware_hz / 1e9:.2f} GHz",
            remedy="choose a larger power mode with nvpmodel" if jetson
            else "cpupower frequency-set --max, or the platform's profile",
        )  # fmt: skip
    # With the pstate drivers `powersave` is the usual name for scaling by load.
    if clock.governor == "powersave" and "pstate" not in clock.driver:
        yield Throttle(
            what="governor", why="the governor powersave keeps the CPU at its lowest clock",
            remedy="cpupower frequency-set --governor schedutil",
        )  # fmt: skip
    if clock.preference == "power":
        yield Throttle(
            what="energy preference", why="the CPU is told to prefer saving power",
            remedy="powerprofilesctl set balanced",
        )  # fmt: skip


def _heat(tree: Tree) -> Iterator[Throttle]:
    """Name the cooling devices that throttle now; fans and idle ones do not count."""
    seen = set()
    for each in tree.glob("sys/class/thermal/cooling_device*"):
        kind, state = tree.line(f"{each}/type"), tree.number(f"{each}/cur_state")
        if not state or state < 0 or kind in seen:
            continue
        if _ALERTS.search(kind):
            seen.add(kind)
            yield Throttle(what="temperature", why=f"{kind} is active: it is too hot",
                           remedy="cool it: fan, heat sink, or a smaller power mode")  # fmt: skip


def _pi(tree: Tree, run: Run) -> Iterator[Throttle]:
    """Read the firmware's flags; what has happened since the start is told once."""
    flags = None
    for path in tree.glob("sys/devices/platform/soc*/*firmware/get_throttled"):
        value = tree.text(path).strip()[:10]
        flags = int(value, 16) if re.fullmatch(r"(?:0x)?[0-9a-fA-F]{1,8}", value) else flags
    if flags is None:
        answer = re.search(r"throttled=0x([0-9a-fA-F]{1,8})", run(["vcgencmd", "get_throttled"]))
        flags = int(answer[1], 16) if answer else 0
    for bit, (what, why, remedy) in _PI_NOW.items():
        if flags >> bit & 1:
            yield Throttle(what=what, why=why, remedy=remedy)
        elif flags >> (bit + 16) & 1:
            yield Throttle(what=what, why=f"since it was started, at times, {why}", remedy=remedy)


def counters_of(tree: Tree) -> dict[str, int]:
    """Read counters of throttling since the start: of heat on x86, of current on Jetson."""
    found: dict[str, int] = {}
    for each in tree.glob("sys/devices/system/cpu/cpu[0-9]*/thermal_throttle"):
        for name in ("core_throttle_count", "package_throttle_count"):
            count = tree.number(f"{each}/{name}")
            if count is not None:
                found[name] = max(found.get(name, 0), count)
    for path in tree.glob("sys/class/hwmon/hwmon*/oc[0-9]_event_cnt"):
        count = tree.number(path)
        if count is not None:
            found[path.rpartition("/")[2]] = count
    return found


def counted(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[Throttle, ...]:
    """Tell what throttled between two readings of `counters_of`."""
    found = []
    for name, count in after.items():
        if count <= before.get(name, count):
            continue
        if name.startswith("oc"):
            why = f"over-current throttling happened {count - before[name]} times ({name})"
            remedy = "use a stronger supply or a smaller power mode"
            found.append(Throttle(what="over-current", why=why, remedy=remedy))
        else:
            why = f"the CPU throttled for heat while this was measured ({name})"
            found.append(Throttle(what="temperature", why=why, remedy="cool it"))
    return tuple(found)
