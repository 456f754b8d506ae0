"""What board this is, in which power mode, and what slows it down."""

import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import psutil

from edgeroute.runtime import machine
from edgeroute.runtime.board_files import Run, Tree, clean, run_command
from edgeroute.runtime.board_throttle import Clock, Throttle, clock_of, counters_of, throttles_of

Kind = Literal["jetson", "raspberry-pi", "apple", "phone", "pc", "other"]

_MODEL: Final = "proc/device-tree/model"
_NVP_STATUS: Final = "var/lib/nvpmodel/status"
_NVP_CONFIG: Final = "etc/nvpmodel.conf"
_UNIFIED: Final = ("jetson", "raspberry-pi", "apple", "phone")
_UNIFIED_NAMES: Final = re.compile(r"DGX Spark|\bGB10\b", re.IGNORECASE)
_INTEL_GRAPHICS: Final = "0000:00:02.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """A machine as its system describes it.

    Attributes:
        kind: what family it is of.
        model: what it calls itself; of a PC its product's or processor's name.
        unified: whether CPU and GPU share one memory, so that copying between them is for
            nothing; False where that is not known.
        power_mode: the mode that nvpmodel set, else the platform's profile and `battery` or
            `ac`; None where there are no modes.
        power_modes: number and name of each mode of nvpmodel.
        on_battery: None where there is no battery.
        storage: what holds the root folder: sd, nvme, ufs or disk; None if unknown.
        clock: of its fastest cores; None where the system does not say.
        throttles: what slows it down now.
        counters: of throttling since it was started, by name; see `counted`.
    """

    kind: Kind
    model: str
    unified: bool
    power_mode: str | None = None
    power_modes: Mapping[int, str] = field(default_factory=dict)
    on_battery: bool | None = None
    storage: str | None = None
    clock: Clock | None = None
    throttles: tuple[Throttle, ...] = ()
    counters: Mapping[str, int] = field(default_factory=dict)


def board(root: Path | None = None, run: Run = run_command, system: str = sys.platform) -> Board:
    """Look at this machine, or at a recorded tree of another one.

    Args:
        root: of the tree; this machine's if not given.
        run: runs a program and returns what it printed.
        system: as `sys.platform`.
    """
    tree = Tree(root or Path("/"))
    if system == "darwin":
        return _mac(run)
    if system != "linux":
        return _elsewhere()
    kind, model = _identify(tree)
    modes = _nvpmodel_modes(tree) if kind == "jetson" else {}
    battery = _on_battery(tree)
    mode = _nvpmodel(tree, run, modes) if kind == "jetson" else _profile(tree, battery)
    quota = machine.cpu_quota() if root is None else None
    clock = clock_of(tree)
    return Board(
        kind=kind, model=model, unified=_unified(tree, kind, model), power_mode=mode,
        power_modes=modes, on_battery=battery, storage=_storage(tree), clock=clock,
        throttles=throttles_of(tree, run, kind=kind, clock=clock, battery=battery, quota=quota),
        counters=counters_of(tree),
    )  # fmt: skip


def _identify(tree: Tree) -> tuple[Kind, str]:
    model = tree.line(_MODEL)
    compatible = tree.text("proc/device-tree/compatible")
    if "Jetson" in model or "nvidia,tegra" in compatible or tree.exists("etc/nv_tegra_release"):
        return "jetson", model or "NVIDIA Jetson"
    if "Raspberry Pi" in model:
        return "raspberry-pi", model
    if tree.exists("system/build.prop"):
        return "phone", model or "Android device"
    product = tree.line("sys/class/dmi/id/product_name")
    x86 = re.search(r"^vendor_id\s*:", tree.text("proc/cpuinfo"), re.M) is not None
    if product or x86:  # a virtual machine may have no DMI
        return "pc", product or _cpu_name(tree)
    return "other", model or _cpu_name(tree)


def _cpu_name(tree: Tree) -> str:
    found = re.search(r"^(?:model name|Hardware)\s*:\s*(.+)$", tree.text("proc/cpuinfo"), re.M)
    return clean(found[1]) if found else platform.machine()


def _unified(tree: Tree, kind: Kind, model: str) -> bool:
    """Whether there is one memory for all; of a PC only where its graphics are surely Intel's."""
    if kind in _UNIFIED or _UNIFIED_NAMES.search(model):
        return True
    cards = [each for each in tree.glob("sys/class/drm/card*") if re.search(r"card[0-9]+$", each)]
    places = [_pci_place(tree, each) for each in cards]
    return bool(places) and all(place == _INTEL_GRAPHICS for place in places)


def _pci_place(tree: Tree, card: str) -> str:
    found = re.search(r"^PCI_SLOT_NAME=(\S+)$", tree.text(f"{card}/device/uevent"), re.M)
    return found[1] if found else ""


def _nvpmodel_modes(tree: Tree) -> dict[int, str]:
    found = {}
    for line in re.findall(r"<\s*POWER_MODEL\s[^<>]{1,200}>", tree.text(_NVP_CONFIG)):
        fields = dict(re.findall(r"(ID|NAME)\s*=\s*([\w.-]{1,60})", line))
        if fields.get("ID", "").isdigit() and "NAME" in fields:
            found[int(fields["ID"][:4])] = fields["NAME"]
    return found


def _nvpmodel(tree: Tree, run: Run, modes: Mapping[int, str]) -> str | None:
    """Read the mode that is set: from nvpmodel's status file, else by asking it, or its service.

    The last reaches into containers, see `jetson_stats`.
    """
    status = re.search(r"pmode:\s*([0-9]{1,4})", tree.text(_NVP_STATUS))
    if status:
        return modes.get(int(status[1]), status[1])
    answer = re.search(r"NV Power Mode:\s*([\w.-]{1,60})", run(["nvpmodel", "-q"]))
    if answer or run is not run_command:
        return answer[1] if answer else None
    from edgeroute.runtime.jetson_stats import power_mode  # others need not wait for its import

    return power_mode()


def _profile(tree: Tree, battery: bool | None) -> str | None:
    """Name the platform's profile and what feeds it, as far as there are such things."""
    words = [tree.line("sys/firmware/acpi/platform_profile")]
    if battery is not None:
        words.append("battery" if battery else "ac")
    return ", ".join(word for word in words if word) or None


def _on_battery(tree: Tree) -> bool | None:
    """Whether a battery feeds the machine; those of mice and keyboards do not."""
    found, plugged, draining = False, False, False
    for each in tree.glob("sys/class/power_supply/*"):
        kind = tree.line(f"{each}/type")
        if kind == "Battery" and tree.line(f"{each}/scope") != "Device":
            found = True
            draining |= tree.line(f"{each}/status") == "Discharging"
        elif kind in ("Mains", "USB"):
            plugged |= tree.number(f"{each}/online") == 1
    return draining and not plugged if found else None


def _storage(tree: Tree) -> str | None:
    """Name what the root folder lies on."""
    for line in tree.text("proc/self/mounts").splitlines():
        words = line.split()
        if len(words) > 1 and words[1] == "/" and words[0].startswith("/dev/"):
            return _storage_kind(tree, words[0].removeprefix("/dev/"))
    return None


def _storage_kind(tree: Tree, device: str) -> str:
    if device.startswith("nvme"):
        return "nvme"
    if device.startswith("mmcblk"):
        name = device.partition("p")[0]
        return "emmc" if tree.line(f"sys/block/{name}/device/type") == "MMC" else "sd"
    return "disk"


def _mac(run: Run) -> Board:
    model = clean(run(["sysctl", "-n", "machdep.cpu.brand_string"])) or platform.machine()
    battery = _plugged()
    settings = run(["pmset", "-g"])
    low = re.search(r"^\s*lowpowermode\s+1\b", settings, re.M) is not None
    words = ["low power"] if low else []
    if battery is not None:
        words.append("battery" if battery else "ac")
    throttles = []
    if low:
        throttles.append(Throttle(
            what="low power mode", why="macOS keeps its clocks low to save energy",
            remedy="sudo pmset -a lowpowermode 0",
        ))  # fmt: skip
    limit = re.search(r"CPU_Speed_Limit\s*=\s*([0-9]{1,3})", run(["pmset", "-g", "therm"]))
    if limit and int(limit[1]) < 100:
        throttles.append(Throttle(
            what="temperature", why=f"macOS holds the CPU at {limit[1]} % of its speed",
            remedy="cool it, and close what is busy",
        ))  # fmt: skip
    apple = model.startswith("Apple")
    return Board(kind="apple" if apple else "pc", model=model, unified=apple,
                 power_mode=", ".join(words) or None, on_battery=battery,
                 throttles=tuple(throttles))  # fmt: skip


def _elsewhere() -> Board:
    """Say what psutil knows: on Windows, whether the mains feed it."""
    battery = _plugged()
    mode = None if battery is None else "battery" if battery else "ac"
    throttles = () if not battery else (Throttle(
        what="battery", why="on battery this system may lower its clocks",
        remedy="plug in the power supply",
    ),)  # fmt: skip
    return Board(kind="pc", model=clean(platform.processor()) or platform.machine(),
                 unified=False, power_mode=mode, on_battery=battery,
                 throttles=throttles)  # fmt: skip


def _plugged() -> bool | None:
    """Whether a battery feeds the machine, as psutil knows; None without one."""
    sensors = getattr(psutil, "sensors_battery", None)
    try:
        found = sensors() if sensors is not None else None
    except (OSError, RuntimeError):
        return None  # no such service on this system
    return None if found is None else found.power_plugged is False
